"""The change of a weight, for every kind: against what the attached layer really does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from livery.models.sd1 import SD1
from livery.nouns import FullSpec, LiveryError, LowRankSpec, TokensSpec, TunerSpec
from livery.tuners.delta import base_weights, delta, deltas, layers, state_of, words
from livery.tuners.tuner import attach_all, build

Learn = Callable[..., dict[str, Tensor]]
CONVOLUTIONS = r"mid_block\.resnets\.0\.conv1|mid_block\.attentions\.0\.proj_in"
LINEAR = r"mid_block\.attentions\.0\.transformer_blocks\.0\.(attn1\.to_[qkv]|ff\.net\.2)"
BOTH = f"{CONVOLUTIONS}|{LINEAR}"
KINDS: dict[str, LowRankSpec] = {
    "lora": LowRankSpec(rank=3, alpha=5, targets=BOTH),
    "lora, rslora": LowRankSpec(rank=3, alpha=5, rslora=True, targets=BOTH),
    "lora, ranks and alphas": LowRankSpec(
        rank=4, ranks={r".*to_q": 2}, alphas={r"denoiser\..*to_v": 1.5}, targets=BOTH
    ),
    "dora": LowRankSpec(rank=3, alpha=5, dora=True, targets=BOTH),
    "loha": LowRankSpec(kind="loha", rank=3, alpha=2, targets=BOTH),
    "lokr": LowRankSpec(kind="lokr", rank=2, alpha=3, targets=BOTH),
    "lokr, whole factors": LowRankSpec(kind="lokr", rank=64, alpha=7, targets=BOTH),
    "lokr, factor": LowRankSpec(kind="lokr", rank=2, factor=2, targets=BOTH),
    "oft": LowRankSpec(kind="oft", rank=4, targets=LINEAR),
}


def attached_outputs(base: SD1, spec: LowRankSpec, state: dict[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """For each changed layer an input, and what the attached layer makes of it."""
    attached = attach_all([build(spec)], base)
    attached.load(state)
    found: dict[str, tuple[Any, Any]] = {}
    for name in layers((spec,), state):
        layer = base.denoiser.get_submodule(name.removeprefix("denoiser."))
        weight = base_weights(base)[f"{name}.weight"]
        shape = (2, weight.shape[1], 5, 5) if weight.ndim == 4 else (2, 7, weight.shape[1])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found[name] = x, layer(x)
    attached.undo()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_plus_delta_does_what_the_attached_layer_does(kind: str, learnt_by: Learn):
    base, spec = SD1.tiny(), KINDS[kind]
    state = learnt_by(base, spec, size=0.3)
    outputs = attached_outputs(base, spec, state)
    changed = dict(deltas(layers((spec,), state), base_weights(base)))
    assert {f"{name}.weight" for name in outputs} == changed.keys()
    assert len(changed) >= 4
    for name, (x, wanted) in outputs.items():
        module: nn.Module = base.denoiser.get_submodule(name.removeprefix("denoiser."))
        weight = module.get_parameter("weight")
        change = changed[f"{name}.weight"]
        assert change.shape == weight.shape
        assert float(change.abs().max()) > 0.01
        with torch.no_grad():
            got = functional_call(module, {"weight": weight + change}, (x,))
        assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_full_is_the_difference_to_the_base(learnt_by: Learn):
    base, spec = SD1.tiny(), FullSpec(targets=r"conv_in\..*")
    state = learnt_by(base, spec)
    changed = dict(deltas(layers((spec,), state), base_weights(base)))
    assert changed.keys() == {"denoiser.conv_in.weight", "denoiser.conv_in.bias"}
    for name, change in changed.items():
        assert torch.equal(change, state[name] - base_weights(base)[name])


def test_the_base_is_the_same_while_something_is_attached():
    base = SD1.tiny()
    before = {name: tensor.clone() for name, tensor in base_weights(base).items()}
    specs: list[TunerSpec] = [LowRankSpec(rank=2), LowRankSpec(kind="lokr", rank=2, targets=LINEAR)]
    attached = attach_all([build(spec) for spec in specs], base)
    during = base_weights(base)
    assert during.keys() == before.keys()
    assert all(torch.equal(during[name], tensor) for name, tensor in before.items())
    attached.undo()


def test_words_are_no_layers(learnt_by: Learn):
    base, spec = SD1.tiny(), TokensSpec(tokens={"<acme>": "shoe"}, vectors=2)
    state = learnt_by(base, spec)
    assert layers((spec,), state) == {}
    assert {key: tuple(rows.shape) for key, rows in words(state).items()} == {
        ("text_encoder", "<acme>"): (2, 32)
    }
    assert state_of({}, words(state)).keys() == state.keys()


def test_what_depends_on_the_base_asks_for_it(learnt_by: Learn):
    base = SD1.tiny()
    for kind in ("dora", "oft"):
        state = learnt_by(base, KINDS[kind])
        name, layer = next(iter(layers((KINDS[kind],), state).items()))
        with pytest.raises(
            LiveryError, match="relative to the base's own weight, and no base model was given"
        ):
            delta(name, layer)


def test_a_kind_that_the_recipe_does_not_name_is_refused(learnt_by: Learn):
    state = learnt_by(SD1.tiny(), KINDS["loha"])
    with pytest.raises(LiveryError, match="of kind 'loha', but its recipe has no such tuner"):
        layers((KINDS["lora"],), state)


def test_another_base_is_named(learnt_by: Learn):
    base = SD1.tiny()
    state = learnt_by(base, KINDS["lora"])
    name, layer = next(iter(layers((KINDS["lora"],), state).items()))
    with pytest.raises(LiveryError, match="made for another base model"):
        delta(name, layer, {f"{name}.weight": torch.zeros(3, 3)})
