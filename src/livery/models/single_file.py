"""Single-file checkpoints in the original layouts, read and written offline.

Reading turns the file's tensors into the parts of a family, by the key maps of its layout; nothing is left
over on either side, or it is said. Writing is the same maps the other way round, and puts the configuration
into the header, so that models of any size come back exactly.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from livery.models import architectures, recognition, text, weights_file
from livery.models.architectures import Architecture
from livery.models.backbone import Backbone
from livery.models.clip_vocabulary import clip_tokenizer, is_clip_vocabulary
from livery.models.layouts import LAYOUTS, UNREAD, Layout
from livery.models.weights_file import Header, Made
from livery.nouns import LiveryError

TOKENIZERS = {"CLIPTokenizer": transformers.CLIPTokenizer, "T5Tokenizer": transformers.T5Tokenizer}
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
)
UNSAID = frozenset({"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"})
"""Keys of transformers' configurations that describe files, not models."""
UNSAID_OF_WORDS = frozenset({"is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file"})
"""Keys of a tokenizer's configuration that tell where it was read."""


def load_single_file(
    path: Path,
    *,
    family: str | None = None,
    device: str = "cpu",
    prediction: str | None = None,
    tokenizers: Path | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Backbone:
    """A base model from one safetensors file in the layout of SD 1.x, SD 2.x, SDXL or SD3.

    `prediction` is "epsilon" or "v", for files that do not say. T5's words ship with no package: `tokenizers`
    is a folder that holds `tokenizer_3`, by default the file's own; without, SD3 is loaded without T5.
    `dtype` none keeps the file's types. What was assumed is in the backbone's `notes`.
    Raises LiveryError when the file is a pickle, damaged, of another family, or of no known shape.
    """
    header = weights_file.read_header(path)
    names = recognition.canonical(header.tensors)
    layout = recognition.layout_of(path, names)
    if family not in (None, layout.family):
        raise LiveryError(f"{path}: a checkpoint of the family {layout.family}, not {family}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            get = cast(Any, file).get_tensor
            predicts, note = recognition.prediction_of(path, header, layout, get, prediction)
            shapes = _architecture(path, header, layout, names, predicts)
            shapes, without = _with_words(path, shapes, layout, names, tokenizers or path.parent)
            parts: dict[str, Any] = {
                part: _read_part(path, get, shapes.parts[part], layout, part, names, dtype)
                for part in shapes.modules
            }
    except (SafetensorError, OSError) as error:
        raise LiveryError(f"{path}: damaged ({error}); get the file again") from None
    for part, config in shapes.parts.items():
        if part not in parts:
            parts[part] = _other(path, part, config)
    backbone = architectures.assemble(shapes.family, {**parts, **shapes.settings}, where=str(path))
    backbone.notes = tuple(filter(None, (note, without, _left_over(path, layout, names))))
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
            name: _described(part, name)
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


def _architecture(
    path: Path, header: Header, layout: Layout, names: Mapping[str, str], predicts: str | None
) -> Architecture:
    """What the file says or fits, with the schedule that was told."""
    found = recognition.stated(path, header)
    if found is None:
        found = recognition.matched(path, header, layout, names, predicts)
    elif found.layout != layout.name:
        raise LiveryError(f"{path}: its header says {found.layout}, its tensors {layout.name}; get it again")
    elif differences := recognition.problems(found, header, layout, names):
        raise LiveryError(f"{path}: its header does not fit its tensors: {differences[0]}; get it again")
    scheduler = recognition.schedule(found.parts["scheduler"], predicts, zero_snr="ztsnr" in names)
    return replace(found, parts={**found.parts, "scheduler": scheduler})


def _with_words(
    path: Path, shapes: Architecture, layout: Layout, names: Mapping[str, str], folder: Path
) -> tuple[Architecture, str]:
    """Find the words of optional encoders, or leave the encoder out; the second is a note, or ""."""
    parts, note = dict(shapes.parts), ""
    for part in layout.optional & set(parts):
        words = part.replace("text_encoder", "tokenizer")
        if not any(name.startswith(layout.parts[part][0]) for name in names):
            del parts[part]
            parts.pop(words, None)
        elif words not in parts and (folder / words).is_dir():
            parts[words] = _words(text.read_tokenizer(transformers.T5Tokenizer, folder / words))
        elif words not in parts:
            del parts[part]
            note = (
                f"{path.name} holds {part} (T5), but its words are in no package: loaded without it; to use "
                f"it, put the folder {words} of a diffusers version of the model beside the file"
            )
    return replace(shapes, parts=parts), note


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


def _other(path: Path, part: str, config: Mapping[str, Any]) -> Any:
    """A scheduler or a tokenizer."""
    if part == "scheduler":
        return architectures.build_other(config, part, str(path))
    kind = TOKENIZERS.get(str(config.get("_class_name")))
    if kind is None:
        raise LiveryError(f"{path}: {part} is of the class {config.get('_class_name')}; not one livery reads")
    if "files" not in config:
        return clip_tokenizer(config["pad_token"], config["model_max_length"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / part
        folder.mkdir()
        for name, content in config["files"].items():
            if name not in TOKENIZER_FILES:
                raise LiveryError(f"{path}: {part} has a file {name}; not one livery reads")
            (folder / name).write_text(content, "utf-8")
        return text.read_tokenizer(kind, folder)


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


def _described(part: Any, name: str) -> dict[str, Any]:
    """A part's configuration as JSON."""
    if name.startswith("tokenizer"):
        return _words(part)
    kind = {"_class_name": type(part).__name__}
    if isinstance(part, transformers.PreTrainedModel):
        config = {key: value for key, value in part.config.to_diff_dict().items() if key not in UNSAID}
    else:
        config = dict(part.config)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return kind | json.loads(json.dumps(plain, default=list))


def _words(tokenizer: Any) -> dict[str, Any]:
    """CLIP's words ship with livery; of other tokenizers the files are kept."""
    kind = {"_class_name": type(tokenizer).__name__}
    if isinstance(tokenizer, transformers.CLIPTokenizer) and is_clip_vocabulary(tokenizer):
        return kind | {"pad_token": tokenizer.pad_token, "model_max_length": tokenizer.model_max_length}
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = {name: (Path(place) / name) for name in TOKENIZER_FILES}
        content = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    told: dict[str, Any] = json.loads(content["tokenizer_config.json"])
    kept = {key: value for key, value in told.items() if key not in UNSAID_OF_WORDS}
    return kind | {"files": content | {"tokenizer_config.json": json.dumps(kept)}}


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
