"""What an adapter does to the weights: the measure of every kind, for checks, conversions and merges.

An adapter's state is read as one `Layer` for each layer it changes; `delta` is then the change of that
layer's weight as one dense matrix. LoRA: Hu et al. 2021 (arXiv:2106.09685), section 4.1. rsLoRA:
Kalajdzievski 2023 (arXiv:2312.03732). DoRA: Liu et al. 2024 (arXiv:2402.09353), section 4.1. LoHa: Hyeon-Woo
et al. 2022 (arXiv:2108.06098), proposition 2. LoKr: Edalati et al. 2022 (arXiv:2212.10650). OFT: Qiu et al.
2023 (arXiv:2306.07280), with the exact Cayley transform.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.nouns import LiveryError, LowRankSpec, TunerSpec

LEAVES: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "oft": ("oft_R.weight",),
}
"""What a state calls the tensors of each kind, behind the layer's name."""
MAGNITUDE = "lora_magnitude_vector.weight"
TOKENS = ".tokens."


@dataclass(frozen=True)
class Layer:
    """What changes one layer: the tensors of one tuner, and the factor of their product.

    Kind "full" has the layer's new parameters themselves as leaves: weight, bias.
    """

    kind: str
    leaves: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def is_dora(self) -> bool:
        return MAGNITUDE in self.leaves

    @property
    def needs_base(self) -> bool:
        """Whether its delta depends on the weight that it changes."""
        return self.kind in ("oft", "full") or self.is_dora

    @property
    def rank(self) -> int:
        """Of the factors; 0 where there are none."""
        leaves = self.leaves
        if self.kind == "lora":
            return leaves["lora_A.weight"].shape[0]
        for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in leaves:
                return leaves[name].shape[0]
        return 0


def layers(tuners: Sequence[TunerSpec], state: Mapping[str, Tensor]) -> dict[str, Layer]:
    """What a state changes, by layer name ("denoiser.mid_block..."). Words of a tokens tuner are left out.

    Raises LiveryError when no tuner of the recipe explains a tensor.
    """
    found: dict[str, Layer] = {}
    for name, tensor in state.items():
        if TOKENS in name:
            continue
        layer, kind, leaf = split(name)
        known = found.setdefault(layer, Layer(kind))
        if known.kind != kind:
            raise LiveryError(
                f"the adapter changes {layer} as {known.kind} and as {kind}; one of them must go"
            )
        known.leaves[leaf] = tensor
    return {name: _scaled(name, layer, tuners) for name, layer in found.items()}


def words(state: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """What a tokens tuner learnt: (tower, new word) -> vectors [n, width]."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, tensor in state.items():
        if TOKENS in name:
            tower, _, word = name.partition(TOKENS)
            found[tower, word] = tensor
    return found


def state_of(
    found: Mapping[str, Layer], vectors: Mapping[tuple[str, str], Tensor] | None = None
) -> dict[str, Tensor]:
    """The reverse of `layers` and `words`; scales live in the recipe, see `alpha_of`."""
    state = {
        f"{name}.{leaf}": tensor for name, layer in found.items() for leaf, tensor in layer.leaves.items()
    }
    state |= {f"{tower}{TOKENS}{word}": tensor for (tower, word), tensor in (vectors or {}).items()}
    return state


def split(name: str) -> tuple[str, str, str]:
    """A tensor's name -> its layer, kind and leaf. What is no low-rank leaf is a parameter itself: full."""
    for kind, leaves in LEAVES.items():
        for leaf in leaves:
            if name.endswith(f".{leaf}"):
                return name.removesuffix(f".{leaf}"), kind, leaf
    layer, _, leaf = name.rpartition(".")
    return layer, "full", leaf


# ------------------------------------------------------------------ scales


def _scaled(name: str, layer: Layer, tuners: Sequence[TunerSpec]) -> Layer:
    if layer.kind in ("full", "oft"):
        return layer
    spec = _spec(name, layer.kind, tuners)
    rank = layer.rank or _setting(spec.ranks, name, spec.rank) or spec.rank
    alpha = _setting(spec.alphas, name, spec.alpha)
    if alpha is None:
        alpha = rank
    return Layer(layer.kind, layer.leaves, alpha / math.sqrt(rank) if spec.rslora else alpha / rank)


def _spec(name: str, kind: str, tuners: Sequence[TunerSpec]) -> LowRankSpec:
    """The tuner that made a layer: of its kind, and aimed at it where several are."""
    part, _, inside = name.partition(".")
    fitting = [spec for spec in tuners if isinstance(spec, LowRankSpec) and spec.kind == kind]
    if not fitting:
        raise LiveryError(f"the adapter's {name} is of kind '{kind}', but its recipe has no such tuner")
    if part == "denoiser":
        aimed = [s for s in fitting if s.targets is not None and re.fullmatch(s.targets, inside)]
        return (aimed or [spec for spec in fitting if spec.targets is None] or fitting)[0]
    return ([spec for spec in fitting if part in spec.towers] or fitting)[0]


def _setting(patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
    """The first pattern that matches a layer's name, within its part or with it, decides."""
    names = (name, name.partition(".")[2])
    fitting = (v for regex, v in patterns.items() if any(re.fullmatch(regex, each) for each in names))
    return next(fitting, default)


# ------------------------------------------------------------------ deltas


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The base's own parameters by "<part>.<name>": no copies, also while low-rank tuners are attached."""
    return {
        f"{part}.{name.replace('.base_layer', '')}": tensor
        for part, module in backbone.modules().items()
        for name, tensor in module.state_dict().items()
        if not any(f".{leaf}." in name or name.endswith(f".{leaf}") for leaf in _STEMS)
    }


_STEMS = ("lora_A", "lora_B", "lora_magnitude_vector", "oft_R", *LEAVES["loha"], *LEAVES["lokr"])


def deltas(
    found: Mapping[str, Layer], weights: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each changed parameter's name ("denoiser.mid_block...weight") and its change, float32, one at a time.

    `weights` (from `base_weights`) is needed for DoRA, OFT and full; LiveryError without.
    """
    for name, layer in found.items():
        if layer.kind == "full":
            for leaf, tensor in layer.leaves.items():
                yield (
                    f"{name}.{leaf}",
                    tensor.float() - _base(f"{name}.{leaf}", weights).to(tensor.device).float(),
                )
        else:
            yield f"{name}.weight", delta(name, layer, weights)


@torch.no_grad()
def delta(name: str, layer: Layer, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The change of a low-rank layer's weight: [out, in] or [out, in, h, w] where the base tells, float32.

    Without `weights` a convolution comes as its factors give it; LoRA's always have the kernel's shape.
    """
    leaves = {leaf: tensor.float() for leaf, tensor in layer.leaves.items()}
    base = None
    if layer.needs_base or (weights is not None and f"{name}.weight" in weights):
        base = _base(f"{name}.weight", weights).to(next(iter(leaves.values())).device).float()
    if layer.kind == "oft":
        assert base is not None
        return _oft(leaves["oft_R.weight"], base)
    change = {"lora": _lora, "loha": _loha, "lokr": _lokr}[layer.kind](leaves) * layer.scale
    if base is not None:
        if change.numel() != base.numel():
            raise LiveryError(
                f"the adapter's {name} is {list(change.shape)}, this base's is {list(base.shape)}: it was "
                "made for another base model"
            )
        change = change.reshape(base.shape)
    if layer.is_dora:
        assert base is not None
        change = _dora(change, leaves[MAGNITUDE], base)
    return change


def _base(name: str, weights: Mapping[str, Tensor] | None) -> Tensor:
    if weights is None or name not in weights:
        where = "no base model was given" if weights is None else "this base model has no such parameter"
        raise LiveryError(f"the change of {name} is relative to the base's own weight, and {where}")
    return weights[name]


def _lora(leaves: Mapping[str, Tensor]) -> Tensor:
    """B A; a convolution's A carries the kernel, its B is 1 x 1."""
    down, up = leaves["lora_A.weight"], leaves["lora_B.weight"]
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _dora(change: Tensor, magnitude: Tensor, base: Tensor) -> Tensor:
    """Rows of W + change, turned to the learnt lengths: equation 5, over outputs as peft does."""
    moved = base + change
    lengths = moved.flatten(1).norm(dim=1)
    return moved * (magnitude.flatten() / lengths).reshape(-1, *[1] * (base.ndim - 1)) - base


def _loha(leaves: Mapping[str, Tensor]) -> Tensor:
    """(A1 B1) * (A2 B2), elementwise; with t1 and t2 each factor is a Tucker product."""
    return _pair(leaves, "hada_w1", "hada_t1") * _pair(leaves, "hada_w2", "hada_t2")


def _lokr(leaves: Mapping[str, Tensor]) -> Tensor:
    """The Kronecker product of w1 [a, c] and w2 [b, d(, h, w)]."""
    first = leaves["lokr_w1"] if "lokr_w1" in leaves else _pair(leaves, "lokr_w1", "")
    second = leaves["lokr_w2"] if "lokr_w2" in leaves else _pair(leaves, "lokr_w2", "lokr_t2")
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _pair(leaves: Mapping[str, Tensor], stem: str, core: str) -> Tensor:
    a, b = leaves[f"{stem}_a"], leaves[f"{stem}_b"]
    if core in leaves:
        return torch.einsum("ijkl,ip,jr->prkl", leaves[core], a, b)
    return a @ b


def _oft(packed: Tensor, base: Tensor) -> Tensor:
    """Inputs turned block by block: W R^T - W, with R = (I - Q)(I + Q)^-1, Cayley's transform of a skew Q."""
    size = round((1 + math.sqrt(1 + 8 * packed.shape[1])) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(packed.shape[0], size, size, device=packed.device)
    skew[:, rows, columns] = packed
    skew = skew - skew.transpose(1, 2)
    one = torch.eye(size, device=packed.device).expand_as(skew)
    turn = torch.linalg.solve(one + skew, one - skew, left=False)
    flat = base.flatten(1)
    blocks = flat.reshape(flat.shape[0], -1, size)
    turned = torch.einsum("onk,nck->onc", blocks, turn.expand(blocks.shape[1], -1, -1))
    return turned.reshape(base.shape) - base
