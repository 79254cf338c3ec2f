"""New words: prompts without them stay as they are, and nothing of the base changes."""

from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from livery.models.backbone import Backbone
from livery.models.sd1 import SD1
from livery.models.sdxl import SDXL
from livery.nouns import LiveryError, TokensSpec
from livery.tuners.tokens import Tokens
from livery.tuners.tuner import build

WORD = "<acme>"
KEY = f"text_encoder.tokens.{WORD}"


def encoded(backbone: SD1, prompt: str) -> Tensor:
    with torch.no_grad():
        return backbone.encode_prompts([prompt]).tokens


def spec(**settings: Any) -> TokensSpec:
    return TokensSpec(**{"tokens": {WORD: "ab"}, **settings})


def ids(backbone: Backbone, text: str, tower: str = "text_encoder") -> list[int]:
    return backbone.tokenizers[tower](text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------ attach, learn, undo


def test_prompts_without_the_word_stay_as_they_are_bit_for_bit(tiny: SD1):
    before = {prompt: encoded(tiny, prompt) for prompt in ("a red cat", "", "Acme")}
    tuner = build(spec(vectors=3))
    assert tuner.touches == {"towers"}
    attached = tuner.attach(tiny)
    attached.load({name: torch.randn(t.shape) for name, t in attached.state().items()})
    for strength in (1, 0.5, 0):
        attached.scale(strength)
        assert all(torch.equal(encoded(tiny, prompt), tensor) for prompt, tensor in before.items())


def test_undo_puts_the_same_objects_back(tiny: SD1):
    tokenizer, embedding = tiny.tokenizers["text_encoder"], tiny.text_encoder.get_input_embeddings()
    held = {name: tensor.clone() for name, tensor in tiny.text_encoder.state_dict().items()}
    word, words = encoded(tiny, f"a {WORD} cat"), len(tokenizer)
    attached = build(spec(vectors=2)).attach(tiny)
    assert tiny.placeholders == {WORD: "<acme> <acme>_1"}
    assert not torch.equal(encoded(tiny, f"a {WORD} cat"), word)
    assert len(tokenizer) == words
    attached.undo()
    attached.undo()
    assert tiny.tokenizers["text_encoder"] is tokenizer
    assert tiny.text_encoder.get_input_embeddings() is embedding
    assert tiny.placeholders == {}
    now = tiny.text_encoder.state_dict()
    assert now.keys() == held.keys()
    assert all(torch.equal(now[name], held[name]) for name in held)
    assert torch.equal(encoded(tiny, f"a {WORD} cat"), word)
    assert not any(param.requires_grad for param in tiny.text_encoder.parameters())


def test_a_word_is_as_many_tokens_as_it_has_vectors(tiny: SD1):
    known = len(tiny.tokenizers["text_encoder"])
    build(spec(vectors=11)).attach(tiny)
    found = ids(tiny, tiny.placeholders[WORD])
    assert found == list(range(known, known + 11))  # <acme>_1 is not taken for the start of <acme>_10
    inside = ids(tiny, f"x{WORD}, y")
    assert inside.count(known) == 1


def test_only_the_vectors_learn(tiny: SD1):
    attached = build(spec(vectors=2, learning_rate=5e-3)).attach(tiny)
    assert attached.params[KEY].shape == (2, 32)
    assert attached.rate(KEY) == 5e-3
    learning = [p for part in tiny.modules().values() for p in part.parameters() if p.requires_grad]
    assert [id(param) for param in learning] == [id(attached.params[KEY])]
    tiny.encode_prompts([f"a {WORD}"]).tokens.square().sum().backward()
    gradient = attached.params[KEY].grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()


def test_words_start_from_words(tiny: SD1):
    table = cast(Any, tiny.text_encoder.get_input_embeddings()).weight
    first, second = table[ids(tiny, "ab")]
    one_to_one = build(spec(vectors=2)).attach(tiny)
    assert torch.equal(one_to_one.state()[KEY], torch.stack([first, second]))
    assert torch.equal(encoded(tiny, f"{WORD} x"), encoded(tiny, "ab x"))
    one_to_one.undo()
    mean = build(spec(vectors=3)).attach(tiny)
    assert torch.allclose(mean.state()[KEY], ((first + second) / 2).expand(3, -1), atol=1e-7)


def test_strength_goes_from_the_first_words_to_what_was_learnt(tiny: SD1):
    attached = build(spec(vectors=2)).attach(tiny)
    start = attached.state()[KEY]
    learnt = torch.randn(2, 32)
    attached.load({KEY: learnt})
    full = encoded(tiny, WORD)
    attached.scale(0.25)
    assert torch.allclose(attached.params[KEY], start + 0.25 * (learnt - start), atol=1e-6)
    assert torch.equal(attached.state()[KEY], learnt)
    attached.scale(0)
    assert torch.equal(encoded(tiny, WORD), encoded(tiny, "ab"))
    attached.scale(1)
    assert torch.equal(encoded(tiny, WORD), full)


def test_lengths_are_kept(tiny: SD1):
    table = cast(Any, tiny.text_encoder.get_input_embeddings()).weight
    mean = sum(float(row.square().sum()) ** 0.5 for row in table) / len(table)
    for keep in (True, False):
        attached = build(spec(vectors=2, keep_norm=keep)).attach(tiny)
        long = 7 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        attached.load({KEY: long})
        attached.after_step()
        lengths, ways = attached.state()[KEY].norm(dim=1), attached.state()[KEY] / long
        assert torch.allclose(lengths, torch.full((2,), mean), atol=1e-5) is keep
        assert torch.allclose(ways, ways[:, :1].expand_as(ways), atol=1e-5)
        attached.undo()


def test_aimed_at_a_state_it_takes_the_words_and_counts_there(tiny: SD1):
    state = {KEY: torch.randn(5, 32), "denoiser.conv_in.lora_A.weight": torch.zeros(1)}
    tuner = Tokens.build(spec(vectors=1)).aimed_at(state)
    attached = tuner.attach(tiny)
    attached.load({KEY: state[KEY]})
    assert len(ids(tiny, tiny.placeholders[WORD])) == 5


def test_several_sets_leave_in_any_order(tiny: SD1):
    tokenizer = tiny.tokenizers["text_encoder"]
    first = build(spec(vectors=2)).attach(tiny)
    alone = encoded(tiny, WORD)
    second = build(TokensSpec(tokens={"<zeta>": "z"})).attach(tiny)
    assert torch.equal(encoded(tiny, WORD), alone)
    second.load({"text_encoder.tokens.<zeta>": torch.randn(1, 32)})
    zeta = encoded(tiny, "<zeta>")
    first.undo()
    assert torch.equal(encoded(tiny, "<zeta>"), zeta)
    again = build(spec(vectors=2)).attach(tiny)
    assert torch.equal(encoded(tiny, WORD), alone)
    second.undo()
    assert torch.equal(encoded(tiny, WORD), alone)
    again.undo()
    assert tiny.tokenizers["text_encoder"] is tokenizer


REFUSED = {
    "known": ({"x": "a"}, r"'x' is a word that text_encoder knows already: choose a new one, such as"),
    "spaces": ({"my style": "a"}, "is empty or has spaces"),
    "empty": ({"": "a"}, "is empty or has spaces"),
    "parts": ({"<acme>": "a", "<acme>2": "b"}, "are part of one another"),
    "no start": ({"<acme>": ""}, "has no word that the base knows"),
}


@pytest.mark.parametrize(("tokens", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_words_that_cannot_be_told_apart_are_refused(tokens: dict[str, str], message: str, tiny: SD1):
    tokenizer, embedding = tiny.tokenizers["text_encoder"], tiny.text_encoder.get_input_embeddings()
    with pytest.raises(LiveryError, match=message):
        build(TokensSpec(tokens=tokens)).attach(tiny)
    assert tiny.tokenizers["text_encoder"] is tokenizer
    assert tiny.text_encoder.get_input_embeddings() is embedding


def test_a_word_cannot_be_added_twice(tiny: SD1):
    build(spec()).attach(tiny)
    with pytest.raises(LiveryError, match="are part of one another"):
        build(spec()).attach(tiny)
    with pytest.raises(LiveryError, match="no text encoder 'text_encoder_4'; it has text_encoder"):
        build(spec(towers=["text_encoder_4"])).attach(tiny)


# ------------------------------------------------------------------ several towers, T5


class Towers:
    """The facts of a backbone that this tuner reads: a CLIP and a T5."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            clip_words = SD1.tiny().tokenizers["text_encoder"]
            t5_words = sentencepiece()
            clip = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(clip_words),
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=16,
                    projection_dim=8,
                )
            )
            t5 = T5EncoderModel(
                T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            )
        self.towers = {"text_encoder": clip.eval(), "text_encoder_3": t5.eval()}
        self.tokenizers: dict[str, Any] = {"text_encoder": clip_words, "text_encoder_3": t5_words}
        self.placeholders: dict[str, str] = {}
        for part in self.towers.values():
            cast(Any, part).requires_grad_(False)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer of T5's kind: words begin with a mark, an end is put behind, some ids are left over."""
    words = ["<pad>", "</s>", "<unk>", "▁", "▁red", "▁shoe", *(chr(letter) for letter in range(97, 123))]
    inner = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def both() -> Any:
    return Towers()


def pooled(backbone: SDXL, prompt: str) -> Tensor:
    with torch.no_grad():
        found = backbone.encode_prompts([prompt]).pooled
    assert found is not None
    return found


def test_every_tower_learns_it_t5_too(both: Any):
    t5 = both.towers["text_encoder_3"]
    shared = t5.shared
    attached = build(TokensSpec(tokens={WORD: "red shoe"}, vectors=2)).attach(both)
    three = f"text_encoder_3.tokens.{WORD}"
    assert set(attached.params) == {KEY, three}
    table = shared.weight
    words = both.tokenizers["text_encoder_3"].convert_tokens_to_ids(["▁red", "▁shoe"])
    assert torch.equal(attached.state()[three], table[words])
    text = f"red {both.placeholders[WORD]} shoe"
    found = both.tokenizers["text_encoder_3"](text)["input_ids"]
    known = len(sentencepiece())
    assert found == [words[0], known, known + 1, words[1], 1]
    t5(torch.tensor([found])).last_hidden_state.square().sum().backward()
    gradient = attached.params[three].grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()
    plain = both.tokenizers["text_encoder_3"]("red red shoe shoe", return_tensors="pt")["input_ids"]
    assert torch.equal(
        t5(torch.tensor([found])).last_hidden_state, t5(plain).last_hidden_state
    )  # as it starts, it is "red shoe"
    attached.undo()
    assert t5.shared is shared
    assert t5.encoder.embed_tokens is shared


def test_a_tower_that_does_not_learn_it_reads_the_first_words(both: Any):
    attached = build(TokensSpec(tokens={WORD: "red shoe"}, towers=("text_encoder_3",), vectors=2)).attach(
        both
    )
    assert set(attached.params) == {f"text_encoder_3.tokens.{WORD}"}
    frozen = cast(Any, both.towers["text_encoder"].get_input_embeddings()).vectors
    assert not any(param.requires_grad for param in frozen)
    ids_of = both.tokenizers["text_encoder"](both.placeholders[WORD], add_special_tokens=False)["input_ids"]
    assert len(ids_of) == 2


def test_prompts_are_pooled_at_their_end_behind_new_words():
    """A new word's id is higher than the end's, by which old CLIP configurations find the end."""
    backbone = SDXL.tiny()
    before = pooled(backbone, "ab x")
    attached = build(spec()).attach(backbone)
    assert set(attached.params) == {KEY, f"text_encoder_2.tokens.{WORD}"}
    assert torch.equal(pooled(backbone, "ab x"), before)
    attached.undo()
    attached = build(spec(vectors=2)).attach(backbone)
    assert torch.equal(pooled(backbone, f"{WORD} x"), before)
