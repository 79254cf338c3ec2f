"""Full fine-tuning: the weights themselves move, and come back bit for bit."""

import pytest
import torch
from torch import Tensor

from livery.models.sd1 import SD1
from livery.nouns import FullSpec, LiveryError, LowRankSpec
from livery.tuners.full import Full
from livery.tuners.tuner import Attached, build
from tests.matrix.cells import weights


def answer(backbone: SD1) -> Tensor:
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(noisy, torch.tensor([10, 800]), backbone.encode_prompts(["a cat", ""]))


def disturb(attached: Attached, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = attached.state()
    attached.load({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_every_weight_of_the_denoiser_and_nothing_else(tiny: SD1):
    before, held = answer(tiny), weights(tiny)
    tuner = build(FullSpec())
    assert tuner.touches == {"denoiser"}
    attached = tuner.attach(tiny)
    assert torch.equal(answer(tiny), before)
    assert set(attached.params) == {f"denoiser.{name}" for name, _ in tiny.denoiser.named_parameters()}
    assert all(param.requires_grad for param in tiny.denoiser.parameters())
    assert not any(param.requires_grad for param in tiny.text_encoder.parameters())
    disturb(attached)
    state = attached.state()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    now = weights(tiny)
    assert all(torch.equal(now[name], state[name]) for name in state)
    assert not torch.allclose(answer(tiny), before, atol=1e-2)
    attached.undo()
    attached.undo()
    assert same(weights(tiny), held)
    assert torch.equal(answer(tiny), before)
    assert not any(param.requires_grad for param in tiny.denoiser.parameters())


def test_towers_learn_at_a_rate_of_their_own(tiny: SD1):
    tuner = build(FullSpec(learning_rate=1e-5, towers={"text_encoder": 1e-6}))
    assert tuner.touches == {"denoiser", "towers"}
    held = weights(tiny)
    attached = tuner.attach(tiny)
    rates = {name: attached.rate(name) for name in attached.params}
    assert set(rates.values()) == {1e-5, 1e-6}
    assert all((rate == 1e-6) == name.startswith("text_encoder.") for name, rate in rates.items())
    assert "text_encoder.embeddings.token_embedding.weight" in rates
    disturb(attached)
    attached.undo()
    assert same(weights(tiny), held)


def test_targets_choose_parameters_by_whole_names(tiny: SD1):
    attached = build(FullSpec(targets=r".*attn[12]\.to_[kv]\.weight")).attach(tiny)
    assert len(attached.params) == 16
    assert sum(param.requires_grad for param in tiny.denoiser.parameters()) == 16
    attached.undo()
    with pytest.raises(LiveryError, match=r"'to_k' matches no parameter; it must match whole .*conv_in\.we"):
        build(FullSpec(targets="to_k")).attach(tiny)
    with pytest.raises(LiveryError, match="no text encoder 'text_encoder_2'; it has text_encoder"):
        build(FullSpec(towers={"text_encoder_2": 1e-6})).attach(tiny)


def test_strength_goes_from_the_base_to_what_was_learnt(tiny: SD1):
    base, held = answer(tiny), weights(tiny)
    attached = build(FullSpec()).attach(tiny)
    disturb(attached)
    learnt, state = answer(tiny), attached.state()
    attached.scale(0)
    assert torch.equal(answer(tiny), base)
    assert same(attached.state(), state)
    for strength in (0.5, 2.0):
        attached.scale(strength)
        now = weights(tiny)
        for name, tensor in state.items():
            assert torch.allclose(now[name], held[name] + strength * (tensor - held[name]), atol=1e-5)
        assert same(attached.state(), state)
    other = {name: tensor + 1 for name, tensor in state.items()}
    attached.load(other)
    assert same(attached.state(), other)
    attached.load(state)
    attached.scale(1)
    assert torch.equal(answer(tiny), learnt)
    attached.scale(0.3)
    attached.undo()
    assert same(weights(tiny), held)


def test_low_precision_weights_come_back_as_they_were(tiny: SD1):
    for param in tiny.denoiser.parameters():
        param.data = param.data.bfloat16()
    held = weights(tiny)
    attached = build(FullSpec()).attach(tiny)
    disturb(attached)
    attached.scale(0.5)
    attached.scale(1)
    state = attached.state()
    assert all(torch.equal(weights(tiny)[name].float(), state[name]) for name in state)
    attached.undo()
    assert same(weights(tiny), held)


def test_aimed_at_a_state_it_takes_those_weights(tiny: SD1):
    spec = FullSpec(targets=r"mid_block\..*", towers={"text_encoder": 1e-6})
    attached = build(spec).attach(tiny)
    disturb(attached)
    state, output = attached.state(), answer(tiny)
    attached.undo()
    others = {"denoiser.conv_in.lora_A.weight": torch.zeros(1), "text_encoder.tokens.<x>": torch.zeros(1, 32)}
    tuner = Full.build(FullSpec()).aimed_at(state | others)
    assert tuner.touches == {"denoiser", "towers"}
    again = tuner.attach(tiny)
    again.load(state)
    assert torch.equal(answer(tiny), output)
    with pytest.raises(LiveryError, match="the adapter has no weight of this base"):
        Full.build(FullSpec()).aimed_at(others).attach(tiny)


def test_a_state_that_does_not_fit_changes_nothing(tiny: SD1):
    attached = build(FullSpec(targets=r"conv_in\..*")).attach(tiny)
    before = attached.state()
    with pytest.raises(LiveryError, match=r"lacks 1 tensors, first denoiser\.conv_in\.bias"):
        attached.load({"denoiser.conv_in.weight": before["denoiser.conv_in.weight"] + 1})
    assert same(attached.state(), before)


def test_it_comes_before_tuners_that_add_layers(tiny: SD1):
    build(LowRankSpec(rank=2)).attach(tiny)
    with pytest.raises(LiveryError, match="name kind 'full' before it"):
        build(FullSpec()).attach(tiny)
