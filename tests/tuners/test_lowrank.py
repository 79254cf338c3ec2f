"""Low-rank tuners: harmless to attach, exact to detach, the formulas they cite, honest about targets."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from livery.models.sd1 import SD1
from livery.nouns import LiveryError, LowRankSpec
from livery.tuners.lowrank import LowRank
from livery.tuners.tuner import Attached, build
from tests.matrix.cells import weights

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
BOTH = r".*(attn1\.to_q|\.proj_in|resnets\.0\.conv1)"
TURNED = r".*(attn1\.to_q|\.proj_in)"

SPECS = {
    "lora": LowRankSpec(rank=4, alpha=3, targets=BOTH),
    "rslora": LowRankSpec(rank=4, alpha=3, rslora=True, targets=BOTH),
    "dora": LowRankSpec(rank=4, alpha=3, dora=True, targets=BOTH),
    "loha": LowRankSpec(kind="loha", rank=3, alpha=2, targets=BOTH),
    "lokr": LowRankSpec(kind="lokr", rank=2, alpha=3, targets=BOTH),
    "lokr, whole factors": LowRankSpec(kind="lokr", rank=64, alpha=3, factor=4, targets=BOTH),
    "oft": LowRankSpec(kind="oft", rank=8, targets=TURNED),
}
every_kind = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def answer(backbone: SD1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    with torch.no_grad():
        return backbone.predict(noisy, torch.tensor([10, 800]), backbone.encode_prompts(["a cat", ""]))


def disturb(attached: Attached, seed: int = 1) -> None:
    """Move every weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    state = attached.state()
    attached.load({n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()})


def anatomy(model: nn.Module) -> list[tuple[str, type, int]]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


# ------------------------------------------------------------------ attach, scale, undo


@every_kind
def test_attach_changes_nothing_bit_for_bit(spec: LowRankSpec, tiny: SD1):
    before = answer(tiny)
    attached = build(spec).attach(tiny)
    assert torch.equal(answer(tiny), before)
    disturb(attached)
    assert not torch.allclose(answer(tiny), before, atol=1e-3)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_nor_in_lower_precision_where_what_learns_stays_float32(
    dtype: torch.dtype, autocast: bool, spec: LowRankSpec, tiny: SD1
):
    for part in tiny.modules().values():
        for param in part.parameters():
            param.data = param.data.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = answer(tiny, dtype)
        attached = build(spec).attach(tiny)
        assert torch.equal(answer(tiny, dtype), before)
    assert {param.dtype for param in attached.params.values()} == {torch.float32}


@every_kind
def test_undo_restores_modules_weights_flags_and_attributes(spec: LowRankSpec, tiny: SD1):
    before, held = anatomy(tiny.denoiser), weights(tiny)
    output, attributes = answer(tiny), set(vars(tiny.denoiser))
    attached = build(spec).attach(tiny)
    disturb(attached)
    attached.scale(0.5)
    attached.undo()
    attached.undo()
    assert anatomy(tiny.denoiser) == before
    assert set(vars(tiny.denoiser)) == attributes
    now = weights(tiny)
    assert now.keys() == held.keys()
    assert all(torch.equal(now[name], held[name]) for name in held)
    assert not any(param.requires_grad for param in tiny.denoiser.parameters())
    assert torch.equal(answer(tiny), output)


@every_kind
def test_strength_goes_from_the_base_to_what_was_learnt(spec: LowRankSpec, tiny: SD1):
    """Each layer's output moves on the straight line between the base's and the learnt one's."""
    base = answer(tiny)
    layer = tiny.denoiser.get_submodule(LAYER)
    x = torch.randn(1, 5, 64)
    plain = layer(x)
    attached = build(spec).attach(tiny)
    disturb(attached)
    state, learnt = attached.state(), answer(tiny)
    whole = tiny.denoiser.get_submodule(LAYER)(x)
    for strength in (0.5, 1.7, 0.25):
        attached.scale(strength)
        wanted = plain + strength * (whole - plain)
        assert torch.allclose(tiny.denoiser.get_submodule(LAYER)(x), wanted, atol=1e-5)
    attached.scale(0)
    assert torch.equal(answer(tiny), base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in attached.state().items())
    attached.scale(1)
    assert torch.equal(answer(tiny), learnt)
    assert all(param.requires_grad for param in attached.params.values())


def test_strength_keeps_a_frozen_adapter_frozen(tiny: SD1):
    attached = LowRank(LowRankSpec(rank=2)).attach(tiny)
    for param in attached.params.values():
        param.requires_grad_(False)
    for strength in (0, 0.5, 1):
        attached.scale(strength)
        assert not any(param.requires_grad for param in attached.params.values())


PAIRS = [
    ("lora", "lora"),
    ("lora", "lokr"),
    ("loha", "lokr"),
    ("dora", "oft"),
    ("oft", "loha"),
    ("oft", "oft"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_several_act_together_and_leave_in_any_order(one: str, other: str, tiny: SD1):
    base, before = answer(tiny), anatomy(tiny.denoiser)
    first = build(SPECS[one]).attach(tiny)
    disturb(first, 1)
    only_first = answer(tiny)
    second = build(SPECS[other]).attach(tiny)
    assert torch.equal(answer(tiny), only_first)
    disturb(second, 2)
    both = answer(tiny)
    assert not torch.allclose(both, only_first, atol=1e-4)
    second.scale(0)
    assert torch.equal(answer(tiny), only_first)
    second.scale(1)
    third = LowRank(LowRankSpec(rank=1, targets=r".*\.to_q")).attach(tiny)
    assert torch.equal(answer(tiny), both)
    disturb(third, 3)
    first.undo()
    assert not torch.equal(answer(tiny), base)
    third.undo()
    second.scale(0)
    assert torch.equal(answer(tiny), base)
    second.undo()
    assert anatomy(tiny.denoiser) == before
    assert torch.equal(answer(tiny), base)


def test_two_loras_add_up(tiny: SD1):
    base, x = tiny.denoiser.get_submodule(LAYER), torch.randn(1, 5, 64)
    wanted = base(x)
    for seed in (1, 2):
        attached = LowRank(LowRankSpec(rank=2, targets=r".*\.to_q")).attach(tiny)
        disturb(attached, seed)
        down, up = (attached.params[f"denoiser.{LAYER}.lora_{side}.weight"] for side in "AB")
        wanted = wanted + x @ down.T @ up.T
    assert torch.allclose(tiny.denoiser.get_submodule(LAYER)(x), wanted, atol=1e-5)


def test_what_another_tuner_trains_stays_trainable(tiny: SD1):
    tiny.denoiser.get_submodule(LAYER).requires_grad_(True)
    attached = LowRank(LowRankSpec(rank=2)).attach(tiny)
    assert tiny.denoiser.get_parameter(f"{LAYER}.base_layer.weight").requires_grad
    attached.undo()
    assert tiny.denoiser.get_parameter(f"{LAYER}.weight").requires_grad


# ------------------------------------------------------------------ what is learnt, and its names


def test_only_the_new_matrices_learn(tiny: SD1):
    attached = LowRank(LowRankSpec(rank=3)).attach(tiny)
    learning = [param for param in tiny.denoiser.parameters() if param.requires_grad]
    assert {id(param) for param in learning} == {id(param) for param in attached.params.values()}
    assert len(attached.params) == 2 * 40
    assert attached.params[f"denoiser.{LAYER}.lora_A.weight"].shape == (3, 64)


LEAVES = {
    "lora": {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)},
    "dora": {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4), "lora_magnitude_vector.weight": (64,)},
    "loha": {"hada_w1_a": (64, 3), "hada_w1_b": (3, 64), "hada_w2_a": (64, 3), "hada_w2_b": (3, 64)},
    "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    "lokr, whole factors": {"lokr_w1": (4, 4), "lokr_w2": (16, 16)},
    "oft": {"oft_R.weight": (8, 28)},
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_have_the_field_s_names(name: str, tiny: SD1):
    attached = build(SPECS[name]).attach(tiny)
    start = f"denoiser.{LAYER}."
    found = {key.removeprefix(start): tuple(t.shape) for key, t in attached.state().items() if start in key}
    assert found == LEAVES[name]


@every_kind
def test_state_is_a_float32_copy_that_loads_to_the_same_output(spec: LowRankSpec, tiny: SD1):
    attached = build(spec).attach(tiny)
    disturb(attached)
    output, state = answer(tiny), attached.state()
    assert state.keys() == attached.params.keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    name = next(iter(state))
    attached.undo()
    again = build(spec).attach(tiny, seed=99)
    again.load(state)
    assert torch.equal(answer(tiny), output)
    state[name].fill_(7)
    assert not torch.equal(again.params[name], state[name])


def test_seeds_decide_the_start_and_leave_the_global_seed_alone(tiny: SD1):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    states = []
    for seed in (1, 1, 2):
        attached = LowRank(LowRankSpec(rank=2)).attach(tiny, seed)
        states.append(attached.state())
        attached.undo()
    assert torch.equal(torch.rand(1), expected)
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@every_kind
def test_aimed_at_a_state_it_takes_those_layers_whatever_the_default_is(spec: LowRankSpec, tiny: SD1):
    attached = build(spec).attach(tiny)
    disturb(attached)
    state, output = attached.state(), answer(tiny)
    attached.undo()
    other = {"text_encoder.tokens.<acme>": torch.zeros(1, 32), "denoiser.conv_in.weight": torch.zeros(1)}
    tuner = build(spec.model_copy(update={"targets": None})).aimed_at(state | other)
    assert tuner.touches == {"denoiser"}
    tuner.attach(tiny).load(state)
    assert torch.equal(answer(tiny), output)


def test_aimed_at_what_is_of_another_kind_or_base_is_refused(tiny: SD1):
    state = LowRank(LowRankSpec(rank=2)).attach(SD1.tiny()).state()
    with pytest.raises(LiveryError, match="no tensors of kind 'loha' for a layer of this base"):
        build(LowRankSpec(kind="loha")).aimed_at(state).attach(tiny)
    strange = {"denoiser.nowhere.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(LiveryError, match="for a layer of this base"):
        build(LowRankSpec()).aimed_at(strange).attach(tiny)
    attached = build(LowRankSpec(rank=2)).aimed_at(state | strange).attach(tiny)
    with pytest.raises(LiveryError, match=r"no place here, first denoiser\.nowhere"):
        attached.load(state | strange)


# ------------------------------------------------------------------ the formulas


def learnt(spec: LowRankSpec, backbone: SD1, layer: str) -> tuple[Tensor, dict[str, Tensor], nn.Module]:
    """The base's weight, what was learnt for it by leaf, and the adapted layer."""
    weight = cast(Tensor, backbone.denoiser.get_submodule(layer).weight).detach().clone()
    attached = build(spec).attach(backbone)
    disturb(attached)
    start = f"denoiser.{layer}."
    leaves = {n.removeprefix(start): t for n, t in attached.state().items() if n.startswith(start)}
    return weight, leaves, backbone.denoiser.get_submodule(layer)


def acted(adapted: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would give with another weight."""
    base = cast(Any, adapted).base_layer
    if isinstance(base, nn.Conv2d):
        return functional.conv2d(x, weight, base.bias, base.stride, base.padding)
    return functional.linear(x, weight, base.bias)


def lora(w: Tensor, p: dict[str, Tensor], scale: float = 3 / 4) -> Tensor:
    down, up = p["lora_A.weight"].flatten(1), p["lora_B.weight"].flatten(1)
    return w + scale * (up @ down).reshape(w.shape)


def dora(w: Tensor, p: dict[str, Tensor]) -> Tensor:
    direction = lora(w, p).flatten(1)
    length = direction.square().sum(1, keepdim=True).sqrt()
    return (p["lora_magnitude_vector.weight"].reshape(-1, 1) * direction / length).reshape(w.shape)


def loha(w: Tensor, p: dict[str, Tensor]) -> Tensor:
    first, second = (p[f"hada_w{i}_a"] @ p[f"hada_w{i}_b"] for i in (1, 2))
    return w + 2 / 3 * (first * second).reshape(w.shape)


def lokr(w: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Kronecker by blocks: block (i, j) is w1[i, j] times the second factor, for each cell of the kernel."""
    small = p["lokr_w1"]
    big = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    rank = 64 if "lokr_w2" in p else 2
    kernel = w.shape[2:]
    big = big.reshape(w.shape[0] // small.shape[0], w.shape[1] // small.shape[1], *kernel)
    rows = [torch.cat([value * big for value in row], dim=1) for row in small]
    return w + 3 / rank * torch.cat(rows, dim=0)


FORMULAS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "lora": lora,
    "rslora": lambda w, p: lora(w, p, 3 / math.sqrt(4)),
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "lokr, whole factors": lokr,
}


@pytest.mark.parametrize("layer", [LAYER, CONV])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_adapted_layer_is_the_formula_s(name: str, layer: str, tiny: SD1):
    weight, leaves, adapted = learnt(SPECS[name], tiny, layer)
    x = torch.randn(2, 5, 64) if layer == LAYER else torch.randn(2, 64, 8, 8)
    wanted = FORMULAS[name](weight, leaves)
    assert not torch.allclose(wanted, weight, atol=0.01)
    assert torch.allclose(adapted(x), acted(adapted, x, wanted), atol=1e-4, rtol=1e-4)


def test_oft_turns_weights_and_keeps_their_singular_values(tiny: SD1):
    weight, leaves, adapted = learnt(SPECS["oft"], tiny, LAYER)
    with torch.no_grad():  # the layer has no bias: it is its matrix
        turned = adapted(torch.eye(64)).T
    blocks = []
    upper = torch.triu_indices(8, 8, 1)
    for entries in leaves["oft_R.weight"]:
        skew = torch.zeros(8, 8)
        skew[upper[0], upper[1]] = entries
        skew = skew - skew.T
        blocks.append((torch.eye(8) - skew) @ torch.linalg.inv(torch.eye(8) + skew))
    rotation = torch.block_diag(*blocks)
    assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-5)
    assert torch.allclose(turned, weight @ rotation.T, atol=1e-5)
    assert not torch.allclose(turned, weight, atol=1e-2)
    values = [torch.linalg.svdvals(matrix) for matrix in (weight, turned)]
    assert torch.allclose(values[0], values[1], atol=1e-5)


def test_oft_takes_the_nearest_block_that_divides_a_layer(tiny: SD1):
    attached = LowRank(LowRankSpec(kind="oft", rank=12, targets=LAYER)).attach(tiny)
    assert attached.params[f"denoiser.{LAYER}.oft_R.weight"].shape in {(8, 28), (4, 120)}


# ------------------------------------------------------------------ ranks, towers, dropout


def test_patterns_give_layers_a_rank_and_alpha_of_their_own(tiny: SD1):
    spec = LowRankSpec(
        rank=4, ranks={r"mid_block\..*": 2, r".*\.attn2\.to_k": 6}, alphas={r"denoiser\.mid_block\..*": 5}
    )
    attached = LowRank(spec).attach(tiny)
    ranks = {name: t.shape[0] for name, t in attached.params.items() if "lora_A" in name}
    assert all((rank == 2) == ("mid_block" in name) for name, rank in ranks.items())
    others = {name: rank for name, rank in ranks.items() if "mid_block" not in name}
    assert {rank for name, rank in others.items() if "attn2.to_k" in name} == {6}
    assert {rank for name, rank in others.items() if "attn2.to_k" not in name} == {4}
    disturb(attached)
    down, up = (attached.params[f"denoiser.{LAYER}.lora_{side}.weight"] for side in "AB")
    layer, x = cast(Any, tiny.denoiser.get_submodule(LAYER)), torch.randn(1, 5, 64)
    assert torch.allclose(layer(x), layer.base_layer(x) + 5 / 2 * x @ down.T @ up.T, atol=1e-5)
    other = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = (attached.params[f"denoiser.{other}.lora_{side}.weight"] for side in "AB")
    layer, x = cast(Any, tiny.denoiser.get_submodule(other)), torch.randn(1, 5, 32)
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ down.T @ up.T, atol=1e-5)


def test_a_pattern_that_matches_nothing_is_an_error(tiny: SD1):
    with pytest.raises(
        LiveryError, match=r"ranks: 'mid_block' matches no adapted layer; it must match whole"
    ):
        LowRank(LowRankSpec(ranks={"mid_block": 2})).attach(tiny)
    with pytest.raises(LiveryError, match=r"alphas: '\(' is not a regular expression"):
        LowRank(LowRankSpec(alphas={"(": 2})).attach(tiny)


def test_text_encoders_are_adapted_at_a_rate_of_their_own(tiny: SD1):
    before = weights(tiny)
    output = answer(tiny)
    tuner = LowRank(LowRankSpec(rank=2, towers={"text_encoder": 1e-5}, learning_rate=3e-4))
    assert tuner.touches == {"denoiser", "towers"}
    attached = tuner.attach(tiny)
    assert torch.equal(answer(tiny), output)
    rates = {name: attached.rate(name) for name in attached.params}
    assert {rate for name, rate in rates.items() if name.startswith("text_encoder.")} == {1e-5}
    assert {rate for name, rate in rates.items() if name.startswith("denoiser.")} == {3e-4}
    assert sum(name.startswith("text_encoder.") for name in rates) == 2 * 2 * 6
    disturb(attached)
    prompts = tiny.encode_prompts(["a cat"]).tokens
    attached.scale(0)
    assert not torch.allclose(tiny.encode_prompts(["a cat"]).tokens, prompts, atol=1e-3)
    assert torch.equal(answer(tiny), output)
    aimed = tuner.aimed_at(attached.state())
    assert aimed.touches == {"denoiser", "towers"}
    attached.undo()
    assert weights(tiny).keys() == before.keys()
    assert torch.equal(answer(tiny), output)
    aimed.attach(tiny).undo()
    with pytest.raises(LiveryError, match="no text encoder 'text_encoder_9'; it has text_encoder"):
        LowRank(LowRankSpec(towers={"text_encoder_9": 1e-5})).attach(tiny)


DROPPED = {
    name: SPECS[name].model_copy(update={"dropout": 0.5}) for name in ("lora", "dora", "loha", "lokr", "oft")
}


@pytest.mark.parametrize("spec", DROPPED.values(), ids=DROPPED.keys())
def test_dropout_acts_while_training_and_from_the_seed_alone(spec: LowRankSpec, tiny: SD1):
    attached = build(spec).attach(tiny)
    disturb(attached)
    steady = answer(tiny)
    assert torch.equal(answer(tiny), steady)
    attached.train()
    drawn = []
    for seed in (1, 2, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn.append(answer(tiny))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    attached.train(False)
    assert torch.equal(answer(tiny), steady)
    assert not any(module.training for module in tiny.denoiser.modules())


def test_training_one_leaves_the_others_and_the_base_as_they_are(tiny: SD1):
    inner = LowRank(LowRankSpec(rank=2, dropout=0.5)).attach(tiny)
    outer = LowRank(LowRankSpec(rank=2)).attach(tiny)
    disturb(inner)
    steady = answer(tiny)
    outer.train()
    assert torch.equal(answer(tiny), steady)


def test_it_learns_under_autocast(tiny: SD1):
    attached = LowRank(LowRankSpec(rank=2)).attach(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny.predict(torch.randn(1, 4, 16, 16), torch.tensor([5]), tiny.encode_prompts(["x"]))
        out.square().mean().backward()
    ups = [param for name, param in attached.params.items() if "lora_B" in name]
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in ups)
    assert any(param.grad.abs().sum() > 0 for param in ups if param.grad is not None)


# ------------------------------------------------------------------ what is refused


def test_names_are_matched_as_a_whole(tiny: SD1):
    with pytest.raises(
        LiveryError, match=r"'to_q' matches no layer; it must match whole names, and there are "
    ):
        LowRank(LowRankSpec(targets="to_q")).attach(tiny)
    with pytest.raises(LiveryError, match="conv_in"):
        LowRank(LowRankSpec(targets="nothing")).attach(tiny)
    with pytest.raises(LiveryError, match="is not a regular expression"):
        LowRank(LowRankSpec(targets="(")).attach(tiny)


def test_oft_refuses_convolutions_that_it_cannot_turn(tiny: SD1):
    before = anatomy(tiny.denoiser)
    with pytest.raises(LiveryError, match=r"kind 'oft' turns linear layers and 1x1 .* is a 3x3 one"):
        LowRank(LowRankSpec(kind="oft", targets=BOTH, ranks={r".*\.to_q": 4})).attach(tiny)
    assert anatomy(tiny.denoiser) == before


def test_a_state_of_another_shape_is_refused_whole(tiny: SD1):
    state = LowRank(LowRankSpec(rank=2)).attach(SD1.tiny()).state()
    attached = LowRank(LowRankSpec(rank=3)).attach(tiny)
    before = attached.state()
    with pytest.raises(LiveryError, match="another rank or another base"):
        attached.load(state)
    first = next(iter(before))
    with pytest.raises(LiveryError, match=f"lacks 1 tensors, first {first}"):
        attached.load({name: tensor + 1 for name, tensor in before.items() if name != first})
    with pytest.raises(LiveryError, match="no place here, first stray"):
        attached.load({**before, "stray": torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in attached.state().items())


def test_each_kind_is_built_from_its_spec():
    for kind in ("lora", "loha", "lokr", "oft"):
        tuner = build(LowRankSpec(kind=kind, rank=5))
        assert tuner == LowRank(LowRankSpec(kind=kind, rank=5))
        assert tuner.touches == {"denoiser"}
