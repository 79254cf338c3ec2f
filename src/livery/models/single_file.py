"""Single-file checkpoints in the original layouts, read and written offline.

Reading turns the file's tensors into the parts of a family, by the key maps of its layout; nothing is left
over on either side, or it is said. Writing is the same maps the other way round, and puts the configuration
into the header, so that models of any size come back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from livery.models import architectures, checkpoint, part_config, recognition, text, weights_file
from livery.models.architectures import Architecture
from livery.models.backbone import Backbone
from livery.models.layouts import LAYOUTS, UNREAD, Layout
from livery.models.weights_file import Header, Made
from livery.nouns import LiveryError

STEMS = {"vae": "diffusion_pytorch_model"}
"""How weight files of parts beside are called, where it is not "model"."""


def load_single_file(
    path: Path,
    *,
    family: str | None = None,
    device: str = "cpu",
    prediction: str | None = None,
    beside: Path | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Backbone:
    """A base model from one safetensors file in the layout of SD 1.x, SD 2.x, SDXL or SD3.

    `prediction` is "epsilon" or "v", for files that do not say. `beside` is a folder, by default the file's
    own, where parts that the file lacks are looked for under their diffusers names: SD3.5's files lack all
    text encoders, and every SD3 file lacks `tokenizer_3`, T5's words, without which T5 is left out.
    `dtype` none keeps the file's types. What was assumed is in the backbone's `notes`.
    Raises LiveryError when the file is a pickle, damaged, of another family, or of no known shape.
    """
    header = weights_file.read_header(path)
    names = recognition.canonical(header.tensors)
    layout = recognition.layout_of(path, names)
    if family not in (None, layout.family):
        raise LiveryError(f"{path}: a checkpoint of the family {layout.family}, not {family}")
    folder, said = beside or path.parent, recognition.stated(path, header)
    others = _beside(folder, layout, names)
    wordless = _wordless(folder, layout, names, said)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            get = cast(Any, file).get_tensor
            predicts, note = recognition.prediction_of(path, header, layout, get, prediction)
            unread = {*others, *wordless}
            shapes = _architecture(path, header, layout, names, said, predicts, unread)
            parts: dict[str, Any] = {
                part: _read_part(path, get, shapes.parts[part], layout, part, names, dtype)
                for part in shapes.modules
                if part not in unread and any(name.startswith(layout.parts[part][0]) for name in names)
            }
    except (SafetensorError, OSError) as error:
        raise LiveryError(f"{path}: damaged ({error}); get the file again") from None
    for part in others & set(shapes.modules):
        kind = architectures.CLASSES[shapes.parts[part]["_class_name"]]
        parts[part] = checkpoint.read_part(kind, folder, part, STEMS.get(part, "model"))
    for part, config in _words_and_schedule(folder, shapes, parts).items():
        parts[part] = part_config.restored(path, part, config)
    backbone = architectures.assemble(shapes.family, {**parts, **shapes.settings}, where=str(path))
    backbone.notes = (
        *filter(None, (note, _left_over(path, layout, names))),
        *(f"{path.name} has no {part}: read from {folder / part}" for part in sorted(others & set(parts))),
        *_without(path, shapes, layout, parts),
    )
    return cast(Any, backbone).to(device)


def save_single_file(backbone: Backbone, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a backbone as one safetensors file in its family's original layout, whole or not at all.

    `dtype` none keeps the weights' types. Raises LiveryError when an adapter is attached: undo or merge it.
    """
    parts = {name: part for name, part in backbone.pipeline().components.items() if part is not None}
    layout = _layout(backbone.family, parts)
    architecture = Architecture(
        title=path.stem,
        family=backbone.family,
        layout=layout.name,
        parts={
            name: part_config.described(part, name)
            for name, part in parts.items()
            if name in layout.parts or name.startswith(("tokenizer", "scheduler"))
        },
        settings={key: getattr(backbone, key) for key in getattr(type(backbone), "settings", {})},
    )
    tensors: dict[str, Made] = {}
    for part in architecture.modules:
        tensors |= _made(path, parts[part], architecture.parts[part], layout, part, dtype)
    predicts = architecture.parts["scheduler"].get("prediction_type")
    if layout.markers and predicts == "v_prediction":
        tensors |= _markers(architecture.parts["scheduler"])
    metadata = {
        "format": "pt",
        recognition.CARD: recognition.card_of(architecture),
        **recognition.modelspec(architecture, path.stem, backbone.resolution, predicts),
    }
    weights_file.write(path, tensors, metadata)


# ------------------------------------------------------------------ reading


def _beside(folder: Path, layout: Layout, names: Mapping[str, str]) -> set[str]:
    """Parts that the file lacks and a folder of diffusers' name holds."""
    lacking = {
        part
        for part, (prefix, _) in layout.parts.items()
        if not any(name.startswith(prefix) for name in names)
    }
    return {part for part in lacking if (folder / part / "config.json").is_file()}


def _wordless(folder: Path, layout: Layout, names: Mapping[str, str], said: Architecture | None) -> set[str]:
    """Optional encoders that cannot be used, for nothing brings their words: T5's are in no package."""
    found: set[str] = set()
    for part in layout.optional:
        words = part.replace("text_encoder", "tokenizer")
        if not (folder / words).is_dir() and (said is None or words not in said.parts):
            found.add(part)
    return found


def _architecture(
    path: Path,
    header: Header,
    layout: Layout,
    names: Mapping[str, str],
    said: Architecture | None,
    predicts: str | None,
    unread: set[str],
) -> Architecture:
    """What the file says or fits, with the schedule that was told."""
    if said is None:
        found = recognition.matched(path, header, layout, names, predicts, unread)
    elif said.layout != layout.name:
        raise LiveryError(f"{path}: its header says {said.layout}, its tensors {layout.name}; get it again")
    elif differences := recognition.problems(said, header, layout, names, unread):
        raise LiveryError(f"{path}: its header does not fit its tensors: {differences[0]}; get it again")
    else:
        found = said
    scheduler = recognition.schedule(found.parts["scheduler"], predicts, zero_snr="ztsnr" in names)
    return replace(found, parts={**found.parts, "scheduler": scheduler})


def _words_and_schedule(
    folder: Path, shapes: Architecture, parts: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Configurations of what has no weights, for the encoders that were read."""
    found = {part: config for part, config in shapes.parts.items() if part not in shapes.modules}
    for part in parts:
        words = part.replace("text_encoder", "tokenizer")
        if words != part and words not in found:
            found[words] = part_config.words_of(text.read_tokenizer(transformers.T5Tokenizer, folder / words))
    return found


def _without(path: Path, shapes: Architecture, layout: Layout, parts: Mapping[str, Any]) -> list[str]:
    """Notes on optional encoders that were left out."""
    return [
        f"{path.name} is loaded without {part} (T5): its words are in no package, and SD3 works without; to "
        f"use it, put the folder {part.replace('text_encoder', 'tokenizer')} of a diffusers version of the "
        f"model beside the file, and {part} too if the file lacks it"
        for part in sorted(layout.optional & set(shapes.parts) - set(parts))
    ]


def _read_part(
    path: Path,
    get: Any,
    config: Mapping[str, Any],
    layout: Layout,
    part: str,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
) -> nn.Module:
    """One part, its weights taken out of the file one by one."""
    with architectures.empty_weights():
        module = architectures.build(config, part, str(path))
    shapes = module.state_dict()
    state: dict[str, Tensor] = {}
    for entry in layout.entries(part, config, shapes):
        if entry.theirs in names:
            tensor = get(names[entry.theirs])
        else:  # one of the layout's identities
            tensor = torch.eye(*shapes[entry.ours[0]].shape)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        state |= zip(entry.ours, entry.way.split(tensor, len(entry.ours)), strict=True)
    module.load_state_dict(state, strict=False, assign=True)
    architectures.tie(module)
    assert not any(parameter.is_meta for parameter in module.parameters()), part
    return module


def _left_over(path: Path, layout: Layout, names: Mapping[str, str]) -> str:
    """A note on tensors of no part; those of parts were compared before."""
    prefixes = tuple(prefix for prefix, _ in layout.parts.values())
    strange = sorted(name for name in names if not name.startswith(prefixes) and not UNREAD.match(name))
    if not strange:
        return ""
    return f"{path.name} has {len(strange)} tensors that no part reads, first {strange[0]}: left out"


# ------------------------------------------------------------------ writing


def _layout(family: str, parts: Mapping[str, Any]) -> Layout:
    """SD 2.x is the family of SD 1.x with OpenCLIP's text encoder, which has gelu for CLIP's quick one."""
    fitting = [layout for layout in LAYOUTS.values() if layout.family == family]
    if not fitting:
        raise LiveryError(f"models of the family '{family}' have no single-file layout; write a folder")
    if family == "sd1":
        return LAYOUTS["sd1" if parts["text_encoder"].config.hidden_act == "quick_gelu" else "sd2"]
    return fitting[0]


def _made(
    path: Path,
    module: nn.Module,
    config: Mapping[str, Any],
    layout: Layout,
    part: str,
    dtype: torch.dtype | None,
) -> dict[str, Made]:
    """The tensors of one part under their original names, each made when it is written."""
    state = module.state_dict()
    with torch.device("meta"):
        plain = architectures.build(config, part, str(path)).state_dict()
    if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in plain.items()}:
        raise LiveryError(
            f"{path}: {part} has other weights than its configuration says; undo or merge attached adapters "
            "and quantisation first"
        )
    made: dict[str, Made] = {}
    for entry in layout.entries(part, config, state):
        ours = [state[name] for name in entry.ours]
        kind = dtype if dtype and ours[0].is_floating_point() else ours[0].dtype
        shape = tuple(entry.way.join([plain[name] for name in entry.ours]).shape)
        made[entry.theirs] = Made(kind, shape, partial(entry.way.join, ours))
    return made


def _markers(scheduler: Mapping[str, Any]) -> dict[str, Made]:
    """Tensors without content by which other tools know a v-prediction SDXL."""
    zero = ("ztsnr",) if scheduler.get("rescale_betas_zero_snr") else ()
    return {name: Made(torch.float32, (0,), lambda: torch.empty(0)) for name in ("v_pred", *zero)}
