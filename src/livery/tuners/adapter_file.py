"""Adapters as files: one safetensors file that holds the tensors, and the card that says what they are.

Tensors are named as diffusers and PEFT name them, and the header has what diffusers reads (rank and alpha,
under `lora_adapter_metadata`: its format has no per-layer alpha). So the file is also a plain diffusers LoRA.
The same tensors and card always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.nouns import Adapter, AdapterCard, LiveryError, LowRankSpec
from livery.tuners.tuner import Attached, attach_all, build

CARD = "livery"
DIFFUSERS = "lora_adapter_metadata"
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save writes a zip of pickles; older files are bare pickles

DIFFUSERS_PARTS: Mapping[str, Mapping[str, str]] = {
    "sd1": {"denoiser": "unet", "text_encoder": "text_encoder"},
}
"""What diffusers calls a family's parts: the first word of each tensor's name."""


def adapter_bytes(card: AdapterCard, state: Mapping[str, Tensor]) -> bytes:
    """The file's content. `state` is what `Attached.state()` gave."""
    parts = _parts(card.family)
    tensors = {_renamed(name, parts): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {
        "format": "pt",
        CARD: card.model_dump_json(),
        DIFFUSERS: json.dumps(_for_diffusers(card, tensors), sort_keys=True),
    }
    return _in_order(safetensors.torch.save(dict(sorted(tensors.items())), metadata))


def write_adapter(path: Path, card: AdapterCard, state: Mapping[str, Tensor]) -> Adapter:
    """Write the file, whole or not at all, and return what it is."""
    content = adapter_bytes(card, state)
    write_bytes(path, content)
    return Adapter(sha256=hashlib.sha256(content).hexdigest(), card=card)


def read_adapter(path: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and its tensors, named as `Attached.load` takes them.

    Raises LiveryError when the file is missing, a pickle, damaged, or a LoRA without livery's card.
    """
    content = _content(path)
    card = _card(path, _metadata(path, content))
    names = {theirs: ours for ours, theirs in _parts(card.family).items()}
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise LiveryError(f"{path}: damaged ({error}); get the file again") from None
    state = {_renamed(name, names, f"{path}: "): tensor for name, tensor in tensors.items()}
    return Adapter(sha256=hashlib.sha256(content).hexdigest(), card=card), state


def read_card(path: Path) -> AdapterCard:
    """Only the card. Raises LiveryError as `read_adapter` does."""
    return _card(path, _metadata(path, _content(path)))


def attach_adapter(backbone: Backbone, path: Path, *, any_base: bool = False) -> Attached:
    """Read a file and attach it. `any_base` also takes one made for another base of the same family.

    Raises LiveryError as `read_adapter` does, and when the adapter was made for another base.
    """
    adapter, state = read_adapter(path)
    return attach_state(backbone, adapter.card, state, any_base=any_base, where=str(path))


def attach_state(
    backbone: Backbone,
    card: AdapterCard,
    state: Mapping[str, Tensor],
    *,
    any_base: bool = False,
    where: str = "adapter",
) -> Attached:
    """Attach what `read_adapter` read; `where` leads the errors. Frozen: for drawing, not for training on."""
    _check_base(backbone, card, any_base, where)
    tuners = [build(spec).aimed_at(state) for spec in card.recipe.tuners]
    attached = attach_all(tuners, backbone)
    try:
        attached.load(state)
    except LiveryError as error:
        attached.undo()
        raise LiveryError(f"{where}: {error}") from None
    for param in attached.params.values():
        param.requires_grad_(False)
    return attached


def _check_base(backbone: Backbone, card: AdapterCard, any_base: bool, where: str) -> None:
    if card.family != backbone.family:
        raise LiveryError(
            f"{where}: made for a base of the family {card.family}, this one is {backbone.family}; "
            "load the base it was made for"
        )
    if card.base_sha256 != backbone.sha256 and not any_base:
        raise LiveryError(
            f"{where}: made for the base {card.base_sha256[:12]} ({card.recipe.base}), this one is "
            f"{backbone.sha256[:12]}; load that base, or allow any base and expect other pictures"
        )


# ------------------------------------------------------------------ names


def _parts(family: str) -> Mapping[str, str]:
    if family not in DIFFUSERS_PARTS:
        raise LiveryError(f"adapters of the family '{family}' have no file format yet")
    return DIFFUSERS_PARTS[family]


def _renamed(name: str, parts: Mapping[str, str], where: str = "") -> str:
    part, _, rest = name.partition(".")
    if part not in parts:
        raise LiveryError(
            f"{where}the adapter's tensor {name} is of no part livery knows: {', '.join(parts)}"
        )
    return f"{parts[part]}.{rest}"


def _for_diffusers(card: AdapterCard, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keywords of peft's LoraConfig for each part that the file touches."""
    targets: dict[str, set[str]] = {}
    for name in tensors:
        part, _, rest = name.partition(".")
        targets.setdefault(part, set()).add(rest.rsplit(".lora_", 1)[0])
    spec = card.recipe.tuners[0]
    assert isinstance(spec, LowRankSpec)
    alpha = spec.rank if spec.alpha is None else spec.alpha
    return {
        f"{part}.{key}": value
        for part, names in targets.items()
        for key, value in {"r": spec.rank, "lora_alpha": alpha, "target_modules": sorted(names)}.items()
    }


# ------------------------------------------------------------------ bytes


def _in_order(content: bytes) -> bytes:
    """The same file with its header's keys sorted: the library writes metadata in a random order.

    Tensors lie by offsets from the header's end, so the header may be written anew: 8 bytes of length, JSON,
    spaces up to a multiple of 8.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LiveryError(f"{path}: cannot be read ({error.strerror}); give an adapter file") from None
    if content.startswith(PICKLE_STARTS) and not _plausible(content):
        raise LiveryError(
            f"{path}: a pickle, which can run code when read; livery takes adapters as safetensors only"
        )
    return content


def _plausible(content: bytes) -> bool:
    """Whether it begins as a safetensors file does: a length that fits, then a JSON object."""
    size = int.from_bytes(content[:8], "little")
    return 8 + size <= len(content) and content[8:9] == b"{"


def _metadata(path: Path, content: bytes) -> dict[str, str]:
    try:
        if not _plausible(content):
            raise ValueError("not a safetensors header")
        size = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except ValueError as error:
        raise LiveryError(f"{path}: not a safetensors file, or damaged ({error}); get it again") from None


def _card(path: Path, metadata: Mapping[str, str]) -> AdapterCard:
    if CARD not in metadata:
        raise LiveryError(
            f"{path}: has no livery card, so it is a plain LoRA or another kind of weights; its base and "
            "recipe are not known; use an adapter that livery trained"
        )
    try:
        card = json.loads(metadata[CARD])
    except ValueError:
        raise LiveryError(f"{path}: its livery card is not valid JSON; get the file again") from None
    return AdapterCard.parse(card, where=str(path))
