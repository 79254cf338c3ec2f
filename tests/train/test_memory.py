"""Memory plans on every family's tiny model: what they promise to change, and that all else stays."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from livery import plugins
from livery.models.backbone import Backbone
from livery.models.device import autocast
from livery.nouns import LowRankSpec, MemorySpec
from livery.train import memory
from livery.train.memory import FusedBackward, Seats, applied, channels_last, compiled, seated, waiting
from livery.train.stored import StoredConv2d, StoredLinear
from livery.tuners.tuner import Attached, build

FAMILIES = sorted(plugins.families())


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Backbone:
    return plugins.families()[request.param].tiny()


@pytest.fixture
def attached(base: Backbone) -> Iterator[Attached]:
    """A LoRA that is no longer a no-op."""
    found = build(LowRankSpec(rank=2)).attach(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in found.params.values():
            param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    yield found
    found.undo()


def plan(**values: Any) -> MemorySpec:
    return MemorySpec(mode="manual", **values)


def weights(base: Backbone) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {"vae": cast(Any, base).vae, **base.modules()}
    return {f"{p}.{n}": t.clone() for p, part in parts.items() for n, t in part.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def step(base: Backbone, attached: Attached, precision: Any = "fp32") -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients on one fixed batch."""
    generator = torch.Generator().manual_seed(7)
    side = base.resolution // base.latent.factor
    noisy, target = torch.randn(2, 2, base.latent.channels, side, side, generator=generator).unbind()
    with torch.no_grad():
        prompts = base.encode_prompts(["a", "b"])
    for param in attached.params.values():
        param.grad = None
    with autocast(base.device, precision, side * side):
        guess = base.predict(noisy, torch.tensor([100, 900]), prompts)
    loss = (guess.float() - target).square().mean()
    loss.backward()
    return float(loss.detach()), {name: cast(Tensor, p.grad).clone() for name, p in attached.params.items()}


def held(part: nn.Module) -> int:
    """Bytes in all of a part's tensors."""
    return sum(t.nbytes for t in (*part.parameters(), *part.buffers()))


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> bool:
    """Whether gradients differ by at most this share of their length, over all parameters together; of two
    that have nothing in common it would be 1.41.
    """
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return apart**0.5 <= share * sum(float(t.square().sum()) for t in other.values()) ** 0.5


@pytest.mark.parametrize(
    ("storage", "bound", "share"),
    [("bf16", 0.75, 0.05), ("fp16", 0.75, 0.05), ("int8", 0.6, 0.1), ("int4", 0.5, 1.2)],
)
def test_stored_weights_train_a_lora_in_less_memory(
    base: Backbone, attached: Attached, storage: Any, bound: float, share: float
):
    loss, exact = step(base, attached)
    whole, sha256, before = held(base.denoiser), base.sha256, weights(base)
    tiny = copy.deepcopy(base.denoiser.state_dict())
    with applied(base, plan(weights=storage)):
        assert held(base.denoiser) < bound * whole
        assert any(isinstance(m, StoredLinear) for m in base.denoiser.modules())
        assert all(param.dtype == torch.float32 for param in attached.params.values())
        stored_loss, gradients = step(base, attached)
    assert stored_loss == pytest.approx(loss, rel=min(share, 0.3))
    assert not same(gradients, exact)
    assert close(gradients, exact, share)
    assert base.sha256 != sha256, "rounded weights are another base"
    assert not any(isinstance(m, StoredLinear | StoredConv2d) for m in base.denoiser.modules())
    assert weights(base).keys() == before.keys()
    base.denoiser.load_state_dict(tiny)
    base.sha256 = sha256
    assert same(weights(base), before)


def test_bf16_weights_change_nothing_where_products_are_bf16_anyway(base: Backbone, attached: Attached):
    loss, exact = step(base, attached, "bf16")
    kept, sha256 = copy.deepcopy(base.denoiser.state_dict()), base.sha256
    with applied(base, plan(weights="bf16")):
        stored_loss, gradients = step(base, attached, "bf16")
    base.denoiser.load_state_dict(kept)
    base.sha256 = sha256
    assert stored_loss == loss
    assert close(gradients, exact, 1e-3)


def test_where_plain_weights_can_wait_elsewhere_they_come_back_bit_for_bit(base: Backbone):
    before = weights(base)
    with memory._stored(base.denoiser, "int4", keep=True):  # pyright: ignore[reportPrivateUsage]
        assert any(isinstance(m, StoredConv2d | StoredLinear) for m in base.denoiser.modules())
    assert same(weights(base), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients_and_keeps_fewer_activations(
    base: Backbone, attached: Attached, precision: Any
):
    def kept(work: Callable[[], Any]) -> tuple[int, Any]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            result = work()
        return sum(sizes), result

    plain, (loss, exact) = kept(lambda: step(base, attached, precision))
    with applied(base, plan(checkpointing=True)):
        assert any(getattr(m, "gradient_checkpointing", False) for m in base.denoiser.modules())
        less, (same_loss, gradients) = kept(lambda: step(base, attached, precision))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.denoiser.modules())
    assert same_loss == loss
    assert same(gradients, exact)
    assert less < plain


def test_a_tower_that_trains_is_checkpointed_without_dropout(base: Backbone):
    name, tower = next(iter(base.towers.items()))
    modes = [module.training for module in tower.modules()]
    tower.requires_grad_(True)
    try:
        exact = base.encode_prompts(["a cat"]).tokens
        with applied(base, plan(checkpointing=True)):
            again = base.encode_prompts(["a cat"]).tokens
            again.sum().backward()
            inner = [m.training for m in tower.modules() if not list(m.children())]
            assert not any(inner), name
    finally:
        tower.requires_grad_(False)
        for param in tower.parameters():
            param.grad = None
    assert torch.equal(exact, again)
    assert [module.training for module in tower.modules()] == modes


def test_compiled_blocks_agree_and_are_plain_again_afterwards(base: Backbone, attached: Attached):
    loss, exact = step(base, attached)
    with compiled(base.denoiser, backend="eager"):
        blocks = [m for m in base.denoiser.modules() if getattr(m, "_compiled_call_impl", None)]
        assert blocks
        compiled_loss, gradients = step(base, attached)
    assert not any(getattr(m, "_compiled_call_impl", None) for m in base.denoiser.modules())
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert close(gradients, exact, 1e-4)


def test_channels_last_is_another_order_of_the_same_values(base: Backbone, attached: Attached):
    before, strides = weights(base), [p.stride() for p in base.denoiser.parameters()]
    loss, _ = step(base, attached)
    with channels_last(base.denoiser):
        assert [p.stride() for p in base.denoiser.parameters()] != strides
        other, _ = step(base, attached)
    assert other == pytest.approx(loss, rel=1e-5)
    assert [p.stride() for p in base.denoiser.parameters()] == strides
    assert same(weights(base), before)


# ---------------------------------------------------------------------------- idle parts


class Watched(Seats):
    """Tells every change of seats; the host of the test is the device itself."""

    def __init__(self, base: Backbone, towers_train: bool) -> None:
        super().__init__(base, towers_train)
        self.told: list[set[str]] = []

    def take(self, names: Any) -> None:
        before = self.seated
        super().take(names)
        if self.seated != before:
            self.told.append(set(self.seated))


def test_a_verb_brings_the_parts_that_it_needs_and_no_other(base: Backbone):
    before, towers = weights(base), set(base.towers)
    seats = Watched(base, towers_train=False)
    with seated(base, seats):
        latents = base.encode_images(torch.zeros(1, 3, base.resolution, base.resolution))
        prompts = base.encode_prompts(["a"])
        base.predict(latents, torch.tensor([1]), prompts)
        base.predict(latents, torch.tensor([1]), prompts)
        assert list(seats.drawing(lambda: [1, 2])()) == [1, 2]
    assert seats.told == [{"vae"}, towers, {"denoiser"}, {"vae", "denoiser", *towers}]
    assert base.home is None
    assert not {"predict", "encode_images"} & vars(base).keys()
    assert same(weights(base), before)


def test_towers_that_train_stay_with_the_denoiser(base: Backbone):
    seats = Watched(base, towers_train=True)
    with seated(base, seats):
        base.encode_prompts(["a"])
    assert seats.told == [{"denoiser", *base.towers}, {"vae", "denoiser", *base.towers}]


def test_on_the_host_itself_nothing_waits(base: Backbone):
    with waiting(base, plan(offload=True), towers_train=False) as seats:
        assert seats is None


# ---------------------------------------------------------------------------- fused backward


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def moved(fused: bool, clip: float) -> tuple[nn.Sequential, int]:
    """Three steps of AdamW, fused or in the usual order with each parameter clipped by itself."""
    model = two_layers()
    params = dict(model.named_parameters())

    def adamw(name: str, param: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.AdamW([param], lr=0.1, weight_decay=0.01)

    way = FusedBackward(params, adamw, clip) if fused else None
    usual = {} if fused else {name: adamw(name, param) for name, param in params.items()}
    left = 0
    for number in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        model(x).square().sum().backward()
        left += sum(param.grad is not None for param in params.values())
        for name, optimizer in usual.items():
            if clip:
                nn.utils.clip_grad_norm_([params[name]], clip)
            optimizer.step()
            optimizer.zero_grad()
    if way:
        way.remove()
        model(torch.ones(1, 5)).sum().backward()
        assert all(param.grad is not None for param in params.values()), "the hooks are gone"
    return model, left


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_fused_backward_moves_as_the_usual_order_does_and_keeps_no_gradient(clip: float):
    usual, kept = moved(False, clip)
    fused, none = moved(True, clip)
    assert (kept, none) == (12, 0)
    assert same(usual.state_dict(), fused.state_dict())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_no_number_moves_nothing_and_is_told(clip: float, number: float):
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    way = FusedBackward(dict(model.named_parameters()), lambda _, p: torch.optim.SGD([p], lr=1.0), clip)
    assert not way.broken
    (model(torch.ones(1, 5)).sum() * number).backward()
    assert way.broken
    assert same(model.state_dict(), before)
