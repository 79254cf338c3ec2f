"""What is traded for memory while a run lasts: stored weights, checkpointing, idle parts, fused backward.

A plan is a `MemorySpec` in mode "manual"; `estimate.choose` makes one from "auto". `waiting` spans the
whole run, `applied` the steps, after the tuners are attached: what trains is never stored small.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from livery.models.backbone import Backbone
from livery.nouns import MemorySpec, sha256_of
from livery.train.stored import Storage, stored

HOST = torch.device("cpu")
ATTENTION: Mapping[SDPBackend, Callable[[], bool]] = {
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
"""Whether each kind may be used at the moment; the CPU asks the same flags."""
P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def applied(backbone: Backbone, plan: MemorySpec) -> Generator[None]:
    """The plan's stored weights, gradient checkpointing and compiled blocks, for the length of a `with`; on a
    card, weights in the order that it reads.

    Only parts at work are touched: the denoiser, and towers in which something trains. Afterwards the
    backbone is what it was. On a card the plain weights wait in the host's memory; on the CPU they would
    take the memory that was to be saved, so they come back rounded, and `backbone.sha256` changes: a base
    with rounded weights is another base, and whoever keeps one loaded can tell.
    """
    parts = [part for name, part in backbone.modules().items() if name == "denoiser" or trains(part)]
    with ExitStack() as stack:
        if plan.weights != "fp32":
            kept = backbone.device.type != "cpu"
            for part in parts:
                stack.enter_context(_stored(part, plan.weights, kept))
            if not kept:
                stack.callback(_rename, backbone, plan.weights)
        if backbone.device.type == "cuda":
            stack.enter_context(channels_last(backbone.denoiser))
        if plan.checkpointing:
            for part in parts:
                stack.enter_context(_checkpointed(part))
        if plan.compile:
            stack.enter_context(compiled(backbone.denoiser))
        yield


def trains(part: nn.Module) -> bool:
    """Whether anything in it learns."""
    return any(param.requires_grad for param in part.parameters())


def _rename(backbone: Backbone, storage: Storage) -> None:
    backbone.sha256 = sha256_of([backbone.sha256, "rounded", storage])


# ---------------------------------------------------------------------------- stored weights


@contextmanager
def _stored(part: nn.Module, storage: Storage, keep: bool) -> Generator[None]:
    """Frozen layers of a part in their stored form; `keep` = plain weights wait on the host."""
    replaced: list[tuple[str, nn.Module, Tensor | None]] = []
    for name, layer in list(part.named_modules()):
        small = stored(layer, storage)
        if small is None:
            continue
        weight = cast(Tensor, layer.weight)
        replaced.append((name, layer, weight.data.to(HOST) if keep else None))
        weight.data = weight.data.new_empty(0)
        part.set_submodule(name, small)
    try:
        yield
    finally:
        for name, layer, kept in replaced:
            small = part.get_submodule(name)
            plain = cast(Tensor, small.weight) if kept is None else kept.to(cast(Tensor, small.codes).device)
            cast(Tensor, layer.weight).data = plain
            part.set_submodule(name, layer)


# ---------------------------------------------------------------------------- checkpointing


@contextmanager
def _checkpointed(part: nn.Module) -> Generator[None]:
    """Gradient checkpointing of diffusers' and transformers' blocks, Chen et al. 2016 (arXiv:1604.06174)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    flags = [(m, m.gradient_checkpointing) for m in part.modules() if hasattr(m, "gradient_checkpointing")]
    modes = [(m, m.training) for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
    each: Any = part
    if hasattr(part, "enable_gradient_checkpointing"):
        each.enable_gradient_checkpointing(recomputed)
    else:
        each.activation_checkpointing_enable()
        for layer, _ in modes:
            # transformers looks at this flag of the layer itself; what is inside stays without dropout.
            layer.training = True
            cast(Any, layer)._gradient_checkpointing_func = recomputed
    try:
        yield
    finally:
        for module, flag in flags:
            cast(Any, module).gradient_checkpointing = flag
        for layer, mode in modes:
            layer.training = mode


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """The function's result; the backward pass computes it again, with the attention that is chosen now."""
    kinds = [kind for kind, enabled in ATTENTION.items() if enabled()]

    def call(*again: Any) -> Any:
        with sdpa_kernel(kinds):
            return function(*again)

    return checkpoint(call, *inputs, use_reentrant=False)


# ---------------------------------------------------------------------------- compiled blocks


@contextmanager
def channels_last(denoiser: nn.Module) -> Generator[None]:
    """Weights of convolutions in the order that a card's matrix units read; the values stay.

    Stored weights take it too where they keep their shape.
    """
    denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        denoiser.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


@contextmanager
def compiled(denoiser: nn.Module, backend: str = "inductor") -> Generator[None]:
    """The denoiser's repeated blocks compiled, each sort once, as diffusers' `compile_repeated_blocks` does.

    A denoiser that does not name them has them in lists of its own.
    """
    sorts: Sequence[str] = getattr(denoiser, "_repeated_blocks", None) or ()
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    blocks = (
        [module for module in denoiser.modules() if type(module).__name__ in sorts]
        if sorts
        else [block for each in lists for block in each]
    )
    before = [getattr(block, "_compiled_call_impl", None) for block in blocks]
    for block in blocks:
        block.compile(backend=backend)
    try:
        yield
    finally:
        for block, call in zip(blocks, before, strict=True):
            setattr(block, "_compiled_call_impl", call)  # noqa: B010 - torch has no way to take it back


# ---------------------------------------------------------------------------- idle parts


class Seats:
    """Which parts are on the device; the others wait on the host. A verb brings what it needs."""

    def __init__(self, backbone: Backbone, towers_train: bool, host: torch.device = HOST) -> None:
        self._home, self._host = backbone.device, host
        self._parts: dict[str, nn.Module] = {"vae": backbone.vae, **backbone.modules()}
        towers = tuple(backbone.towers)
        learning = ("denoiser", *(towers if towers_train else ()))
        self.needs: dict[str, tuple[str, ...]] = {
            "encode_images": ("vae",),
            "decode_latents": ("vae",),
            "encode_prompts": learning if towers_train else towers,
            "predict": learning,
        }
        self.seated = frozenset(self._parts)

    def take(self, names: Iterable[str]) -> None:
        """Exactly these parts on the device. Does nothing when they are there already."""
        wanted = frozenset(names)
        if wanted == self.seated:
            return
        for name in self._parts.keys() - wanted:
            self._parts[name].to(self._host)
        for name in wanted:
            self._parts[name].to(self._home)
        self.seated = wanted

    def take_all(self) -> None:
        self.take(self._parts)

    def drawing(self, draw: Callable[P, Iterable[T]]) -> Callable[P, Iterator[T]]:
        """The same, with every part on the device while it draws: pipelines reach into parts directly."""

        def with_all(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
            self.take_all()
            yield from draw(*args, **kwargs)

        return with_all


@contextmanager
def waiting(backbone: Backbone, plan: MemorySpec, *, towers_train: bool) -> Generator[Seats | None]:
    """With the plan's `offload`, parts that idle wait on the host until a verb needs them; on a CPU they are
    there already. In the end all are back on their device.
    """
    if not plan.offload or backbone.device.type == "cpu":
        yield None
        return
    with seated(backbone, Seats(backbone, towers_train)) as seats:
        yield seats


@contextmanager
def seated(backbone: Backbone, seats: Seats) -> Generator[Seats]:
    """Have the backbone's verbs take their seats before they work."""
    backbone.home = backbone.device
    for verb, names in seats.needs.items():
        setattr(backbone, verb, _after(lambda names=names: seats.take(names), getattr(backbone, verb)))
    try:
        yield seats
    finally:
        for verb in seats.needs:
            delattr(backbone, verb)
        seats.take_all()
        backbone.home = None


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


# ---------------------------------------------------------------------------- fused backward


class FusedBackward:
    """Each weight moves as soon as its gradient is there, which is then dropped: never two live at once.

    LOMO, Lv et al. 2023 (arXiv:2306.09782), with a whole optimiser for each parameter. The length of the
    whole gradient is not known in time, so `clip_norm` bounds each parameter's own gradient; 0 bounds
    none. A gradient that is not finite counts as zero and sets `broken`, a flag on the device: to ask it for
    each parameter would make the host wait as often. The caller sets rates before the backward pass, reads
    the flag after it, and never accumulates.
    """

    def __init__(
        self,
        params: Mapping[str, Parameter],
        build: Callable[[str, Parameter], torch.optim.Optimizer],
        clip_norm: float,
    ) -> None:
        self.optimizers = {name: build(name, param) for name, param in params.items()}
        self._clip_norm = clip_norm
        self.broken = torch.zeros((), dtype=torch.bool, device=next(iter(params.values())).device)
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._mover(self.optimizers[name]))
            for name, param in params.items()
        ]

    def remove(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _mover(self, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def move(param: Tensor) -> None:
            norm = nn.utils.clip_grad_norm_([param], self._clip_norm or float("inf"))
            self.broken |= ~torch.isfinite(norm)
            assert param.grad is not None, "the hook runs when the gradient is there"
            param.grad.nan_to_num_(0.0, 0.0, 0.0)  # the clipped gradient is then 0 or no number throughout
            optimizer.step()
            param.grad = None

        return move
