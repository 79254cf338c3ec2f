"""Adapters as files: one safetensors file that holds the tensors, and the card that says what they are.

Tensors of every kind are named as in `Attached.state()`, with diffusers' words for the parts. A LoRA's
header also has what diffusers reads (rank and alpha, under `lora_adapter_metadata`), so its file is a plain
diffusers LoRA too. The same tensors and card always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.nouns import Adapter, AdapterCard, LiveryError
from livery.tuners import tensor_file
from livery.tuners.delta import layers
from livery.tuners.formats.diffusers_lora import METADATA, lora_metadata
from livery.tuners.formats.names import DIFFUSERS_PARTS, part_names
from livery.tuners.tuner import Attached, attach_all, build

CARD = "livery"


def adapter_bytes(card: AdapterCard, state: Mapping[str, Tensor]) -> bytes:
    """The file's content. `state` is what `Attached.state()` gave."""
    parts = part_names(DIFFUSERS_PARTS, card.family)
    tensors = {_renamed(name, parts): tensor for name, tensor in state.items()}
    metadata = {"format": "pt", CARD: card.model_dump_json()}
    found = layers(card.recipe.tuners, state)
    if found and all(layer.kind == "lora" for layer in found.values()):
        metadata[METADATA] = json.dumps(lora_metadata(found, card.family), sort_keys=True)
    return tensor_file.to_bytes(tensors, metadata)


def write_adapter(path: Path, card: AdapterCard, state: Mapping[str, Tensor]) -> Adapter:
    """Write the file, whole or not at all, and return what it is."""
    content = adapter_bytes(card, state)
    write_bytes(path, content)
    return Adapter(sha256=hashlib.sha256(content).hexdigest(), card=card)


def read_adapter(path: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and its tensors, named as `Attached.load` takes them.

    Raises LiveryError when the file is missing, a pickle, damaged, or an adapter without livery's card.
    """
    content = tensor_file.content_of(path)
    card = _card(path, tensor_file.metadata_of(content))
    names = {theirs: ours for ours, theirs in part_names(DIFFUSERS_PARTS, card.family).items()}
    tensors = tensor_file.tensors_of(path, content)
    state = {_renamed(name, names, f"{path}: "): tensor for name, tensor in tensors.items()}
    return Adapter(sha256=hashlib.sha256(content).hexdigest(), card=card), state


def read_card(path: Path) -> AdapterCard:
    """Only the card. Raises LiveryError as `read_adapter` does."""
    return _card(path, tensor_file.metadata_of(tensor_file.content_of(path)))


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
    try:
        attached = attach_all([build(spec).aimed_at(state) for spec in card.recipe.tuners], backbone)
    except LiveryError as error:
        raise LiveryError(f"{where}: {error}") from None
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


def _renamed(name: str, parts: Mapping[str, str], where: str = "") -> str:
    part, _, rest = name.partition(".")
    if part not in parts:
        raise LiveryError(
            f"{where}the adapter's tensor {name} is of no part livery knows: {', '.join(parts)}"
        )
    return f"{parts[part]}.{rest}"


def _card(path: Path, metadata: Mapping[str, str]) -> AdapterCard:
    if CARD not in metadata:
        raise LiveryError(
            f"{path}: has no livery card, so it is a plain LoRA or another kind of weights; its base and "
            "recipe are not known; bring it in with `livery import-adapter`, which asks for its base"
        )
    try:
        card = json.loads(metadata[CARD])
    except ValueError:
        raise LiveryError(f"{path}: its livery card is not valid JSON; get the file again") from None
    return AdapterCard.parse(card, where=str(path))
