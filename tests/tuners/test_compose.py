"""Several tuners as one: pivotal tuning, and what cannot go together."""

import pytest
import torch
from torch import Tensor

from livery.models.sd1 import SD1
from livery.nouns import FullSpec, LiveryError, LowRankSpec, PluginSpec, TokensSpec
from livery.tuners.tuner import attach_all, build, touched
from tests.matrix.cells import weights

PIVOTAL = (
    TokensSpec(tokens={"<acme>": "ab"}, vectors=2, learning_rate=5e-3),
    LowRankSpec(rank=2, towers={"text_encoder": 1e-5}),
)


def answer(backbone: SD1, prompt: str = "<acme> cat") -> Tensor:
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(noisy, torch.tensor([500]), backbone.encode_prompts([prompt]))


def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in state.items()}


def test_pivotal_tuning_is_one_attached(tiny: SD1):
    held, base, plain = weights(tiny), answer(tiny), answer(tiny, "cat")
    tuners = [build(spec) for spec in PIVOTAL]
    assert touched(tuners) == {"denoiser", "towers"}
    attached = attach_all(tuners, tiny, seed=3)
    assert torch.equal(answer(tiny, "cat"), plain)
    start = answer(tiny)
    rates = {name: attached.rate(name) for name in attached.params}
    assert rates["text_encoder.tokens.<acme>"] == 5e-3
    assert rates["text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"] == 1e-5
    assert rates["denoiser.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"] is None

    state = moved(attached.state())
    assert state.keys() == attached.params.keys()
    attached.load(state)
    attached.after_step()
    kept = attached.state()
    changed = [name for name in state if not torch.equal(kept[name], state[name])]
    assert changed == ["text_encoder.tokens.<acme>"]
    learnt = answer(tiny)
    attached.scale(0)
    assert torch.equal(answer(tiny, "cat"), plain)
    assert torch.equal(answer(tiny), start)
    attached.scale(1)
    assert torch.equal(answer(tiny), learnt)

    attached.undo()
    attached.undo()
    now = weights(tiny)
    assert now.keys() == held.keys()
    assert all(torch.equal(now[name], held[name]) for name in held)
    assert torch.equal(answer(tiny), base)

    again = attach_all([tuner.aimed_at(kept) for tuner in tuners], tiny)
    again.load(kept)
    assert torch.equal(answer(tiny), learnt)


def test_a_state_is_taken_whole_or_not_at_all(tiny: SD1):
    attached = attach_all([build(spec) for spec in PIVOTAL], tiny)
    before = attached.state()
    broken = moved(before)
    broken[list(broken)[-1]] = torch.zeros(1)
    with pytest.raises(LiveryError, match="it is of another rank or another base"):
        attached.load(broken)
    after = attached.state()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_dropout_is_switched_for_all(tiny: SD1):
    specs = (LowRankSpec(rank=2, dropout=0.5, targets=r".*to_q"), LowRankSpec(rank=2, targets=r".*to_k"))
    attached = attach_all([build(spec) for spec in specs], tiny)
    attached.load(moved(attached.state()))
    steady = answer(tiny)
    attached.train()
    assert not torch.equal(answer(tiny), steady)
    attached.train(False)
    assert torch.equal(answer(tiny), steady)


def test_two_low_ranks_share_a_state_by_their_targets(tiny: SD1):
    specs = (
        LowRankSpec(rank=2, targets=r".*to_q", learning_rate=1e-3, towers={"text_encoder": 1e-5}),
        LowRankSpec(kind="lora", rank=3, targets=r".*to_k"),
        LowRankSpec(kind="loha", rank=2, targets=r".*to_q"),
    )
    tuners = [build(spec) for spec in specs]
    attached = attach_all(tuners, tiny)
    state = moved(attached.state())
    attached.load(state)
    learnt = answer(tiny)
    attached.undo()
    again = attach_all([tuner.aimed_at(state) for tuner in tuners], tiny)
    again.load(state)
    assert torch.equal(answer(tiny), learnt)


def test_full_weights_take_new_words_and_low_ranks_behind_them(tiny: SD1):
    held = weights(tiny)
    specs = (FullSpec(towers={"text_encoder": 1e-6}), *PIVOTAL)
    attached = attach_all([build(spec) for spec in specs], tiny)
    state = moved(attached.state())
    attached.load(state)
    learnt = answer(tiny)
    attached.undo()
    now = weights(tiny)
    assert all(torch.equal(now[name], held[name]) for name in held)
    again = attach_all([build(spec).aimed_at(state) for spec in specs], tiny)
    again.load(state)
    assert torch.equal(answer(tiny), learnt)


def test_two_that_learn_the_same_are_refused_and_leave_nothing(tiny: SD1):
    held, modules = weights(tiny), [id(module) for module in tiny.denoiser.modules()]
    for specs in ([LowRankSpec(rank=2), LowRankSpec(rank=4)], [FullSpec(), FullSpec(targets=r"conv_in\..*")]):
        with pytest.raises(LiveryError, match="two of them learn denoiser"):
            attach_all([build(spec) for spec in specs], tiny)
        assert [id(module) for module in tiny.denoiser.modules()] == modules
        assert weights(tiny).keys() == held.keys()
        assert not any(param.requires_grad for param in tiny.denoiser.parameters())
    with pytest.raises(LiveryError, match="matches no layer"):
        attach_all([build(LowRankSpec()), build(LowRankSpec(targets="nothing"))], tiny)
    assert [id(module) for module in tiny.denoiser.modules()] == modules


def test_none_is_refused(tiny: SD1):
    with pytest.raises(LiveryError, match="none is named"):
        attach_all([], tiny)


def test_a_kind_nobody_registered_is_named():
    with pytest.raises(LiveryError, match=r"no tuner is called 'lorra': did you mean 'lora'\?"):
        build(PluginSpec(kind="lorra"))
