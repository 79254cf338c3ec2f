"""Adapter files of any tool: what they hold for a given base, in livery's terms.

A file says neither its base nor, reliably, its kind: the base is named by who imports it, and every tensor is
matched with a layer that the base really has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, LiveryError
from livery.tuners import tensor_file
from livery.tuners.adapter_file import CARD, attach_state, read_adapter
from livery.tuners.delta import base_weights, layers, state_of, words
from livery.tuners.derived import derived_card
from livery.tuners.formats.content import Content
from livery.tuners.formats.diffusers_lora import from_diffusers
from livery.tuners.formats.embedding import KEYS, from_embedding
from livery.tuners.formats.kohya import from_kohya
from livery.tuners.formats.names import adaptable, kohya_aliases, swapped_layers
from livery.tuners.rank import reduced

CHECKPOINTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
LORA_WORDS = ("lora_A", "lora_B", "lora.down", "lora.up", "lora_linear_layer")


def import_adapter(
    path: Path, backbone: Backbone, *, base: str, word: str = "", rank: int | None = None
) -> tuple[AdapterCard, dict[str, Tensor], Content]:
    """A file of another tool as card and state, which `write_adapter` takes, and what was found in it.

    `base` is what the base is called; `word` what a Textual Inversion file teaches (default: its name);
    `rank` brings LoHa and LoKr to plain LoRA. A file of livery's own keeps its card. Raises LiveryError when
    nothing fits the base, or when the tensors cannot be attached here.
    """
    content = read_file(path, backbone, word)
    told = tensor_file.metadata_of(tensor_file.content_of(path))
    if CARD in told and rank is None:
        adapter, state = read_adapter(path)
        attach_state(backbone, adapter.card, state, where=str(path)).undo()
        return adapter.card, state, content
    found = content.layers
    if rank is not None:
        found, report = reduced(found, rank, base_weights(backbone))
        content = replace(content, reduced=report)
    card = derived_card(
        found,
        content.words,
        backbone,
        base=base,
        origin=f"imported from {path.name}, the base as named",
        trigger=str(told.get("modelspec.trigger_phrase", "")),
    )
    state = state_of(found, content.words)
    try:
        attach_state(backbone, card, state, where=str(path)).undo()
    except LiveryError as error:
        hint = "" if rank else "; if its factors have another form, give a rank to make it a plain LoRA"
        raise LiveryError(f"{error}{hint}") from None
    return card, state, content


def read_file(path: Path, backbone: Backbone, word: str = "") -> Content:
    """What a file of livery, kohya, LyCORIS, diffusers or Textual Inversion changes in this base.

    Raises LiveryError when it is a pickle, damaged, of none of these, or of another base model.
    """
    raw = tensor_file.content_of(path)
    told = tensor_file.metadata_of(raw)
    if CARD in told:
        return _ours(path, backbone)
    tensors = tensor_file.tensors_of(path, raw)
    try:
        content = _content(tensors, told, backbone, word or path.stem)
    except LiveryError as error:
        raise LiveryError(f"{path}: {error}") from None
    if not content.layers and not content.words:
        raise LiveryError(
            f"{path}: none of its {len(tensors)} tensors has a place in this base, first "
            f"{next(iter(tensors))}; name the base it was made for"
        )
    return content


def _content(
    tensors: Mapping[str, Tensor], told: Mapping[str, str], backbone: Backbone, word: str
) -> Content:
    if not tensors:
        raise LiveryError("it holds no tensor; get the file again")
    modules = adaptable(backbone)
    if any(name.startswith(("lora_unet_", "lora_te", "lora_transformer_")) for name in tensors):
        return from_kohya(tensors, kohya_aliases(backbone), modules, swapped_layers(backbone))
    if any(part in name for name in tensors for part in LORA_WORDS):
        return from_diffusers(tensors, told, backbone.family, modules)
    if any(name in KEYS for name in tensors) or all(tensor.ndim <= 2 for tensor in tensors.values()):
        return from_embedding(tensors, backbone.family, word_widths(backbone), word)
    if any(name.startswith(CHECKPOINTS) for name in tensors):
        raise LiveryError(
            "a whole checkpoint: name it as a base, or take what it learnt with `livery extract`"
        )
    raise LiveryError(f"of no format that livery reads, its first tensor is {next(iter(tensors))}")


def word_widths(backbone: Backbone) -> dict[str, int]:
    """The length of a word's vector in each text encoder."""
    return {name: _embedding(tower).weight.shape[1] for name, tower in backbone.towers.items()}


def _embedding(tower: Any) -> Any:
    return cast(Any, tower).get_input_embeddings()


def _ours(path: Path, backbone: Backbone) -> Content:
    adapter, state = read_adapter(path)
    if adapter.card.family != backbone.family:
        raise LiveryError(
            f"{path}: made for a base of the family {adapter.card.family}, this one is {backbone.family}"
        )
    return Content(layers(adapter.card.recipe.tuners, state), words(state), len(state))
