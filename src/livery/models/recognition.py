"""What a single-file checkpoint is, told from its header: layout, architecture, and what it predicts.

A file that livery wrote says so itself. Any other is compared, tensor by tensor, with the shipped
architectures of its layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livery.models import architectures
from livery.models.architectures import Architecture
from livery.models.key_maps import CONVOLVED
from livery.models.layouts import DENOISER, LAYOUTS, UNREAD, Layout
from livery.models.weights_file import Header
from livery.nouns import LiveryError

CARD = "livery_base"
"""Where livery puts an architecture into the header of a file that it writes."""
VERSION = 1

# What else such files are: the first sign that a name has.
STRANGERS: Mapping[str, str] = {
    r"(lora_|lycoris_)|.*\.(lora_(A|B|up|down)|hada_|lokr_|oft_)": "an adapter, not a base model",
    r"(conditioner\.embedders\.0\.model\.)": "an SDXL refiner; give the SDXL base",
    r"(emb_params|clip_l|clip_g|t5xxl)$": "an embedding, not a base model",
    r"(control_model\.|input_hint_block\.|controlnet_)": "a ControlNet, not a base model",
    r"(model\.diffusion_model\.)?double_blocks\.": "a FLUX or other model that livery does not read",
    r"joint_blocks\.": "the transformer of SD3 alone; get the file that includes its other parts",
    r"(down_blocks|transformer_blocks|encoder\.down_blocks|text_model)\.": (
        "one part of a diffusers folder; give the whole folder"
    ),
    r"edm_mean$": "an EDM model (Playground 2.5), which livery does not read",
}
# The first SD 1.x fine-tunes named the text encoder so.
ALIASES = re.compile(r"cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
SPREAD = f"{DENOISER}output_blocks.11.1.transformer_blocks.0.norm1.bias"
SPREAD_OF_V = 0.09
SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")


def canonical(names: Iterable[str]) -> dict[str, str]:
    """The name that the layout has -> the name in the file."""
    return {ALIASES.sub("cond_stage_model.transformer.text_model.", name): name for name in names}


def layout_of(path: Path, names: Iterable[str]) -> Layout:
    """By names alone. Raises LiveryError that says what the file is instead."""
    names = list(names)
    for sign, what in STRANGERS.items():
        if any(re.match(sign, name) for name in names):
            raise LiveryError(f"{path}: {what}")
    for layout in LAYOUTS.values():
        if any(name.startswith(layout.sign) for name in names):
            return layout
    if any(name.startswith(DENOISER) for name in names):
        raise LiveryError(f"{path}: a denoiser without its text encoders; get the file that includes them")
    raise LiveryError(
        f"{path}: not a checkpoint in the layout of Stable Diffusion 1, 2, XL or 3; give such a file or a "
        "diffusers folder"
    )


def stated(path: Path, header: Header) -> Architecture | None:
    """What the file says of itself, if livery wrote it. Raises LiveryError when that cannot be read."""
    if CARD not in header.metadata:
        return None
    try:
        card = json.loads(header.metadata[CARD])
        if card.pop("version") > VERSION:
            raise LiveryError(f"{path}: written by a newer livery; update this one")
        found = Architecture(**card)
        if LAYOUTS[found.layout].family != found.family:
            raise ValueError(f"layout {found.layout} of {found.family}")
        for config in (*found.parts.values(), found.settings):
            dict(config)
        return found
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LiveryError(f"{path}: what livery wrote into its header is damaged ({error})") from None


def card_of(architecture: Architecture) -> str:
    """What `stated` reads."""
    said = {
        "title": architecture.title,
        "family": architecture.family,
        "layout": architecture.layout,
        "parts": architecture.parts,
        "settings": architecture.settings,
    }
    return json.dumps({"version": VERSION, **said}, sort_keys=True)


def matched(
    path: Path,
    header: Header,
    layout: Layout,
    names: Mapping[str, str],
    prediction: str | None,
    unread: Collection[str] = (),
) -> Architecture:
    """The shipped architecture whose shapes the file has; among equal ones, the one that predicts so.

    Parts in `unread` are not compared. Raises LiveryError that names the first tensor that fits none.
    """
    candidates = [
        found for found in map(architectures.architecture, architectures.NAMES) if found.layout == layout.name
    ]
    differences = {found.title: problems(found, header, layout, names, unread) for found in candidates}
    fitting = [found for found in candidates if not differences[found.title]]
    if fitting:
        said = [a for a in fitting if a.parts["scheduler"].get("prediction_type") == prediction]
        return (said or fitting)[0]
    nearest = min(differences, key=lambda title: len(differences[title]))
    raise LiveryError(
        f"{path}: not {' or '.join(differences)}: {differences[nearest][0]}; other sizes are read from a "
        "diffusers folder, or from a file that livery wrote"
    )


def problems(
    architecture: Architecture,
    header: Header,
    layout: Layout,
    names: Mapping[str, str],
    unread: Collection[str] = (),
) -> list[str]:
    """Each way in which the file's tensors differ from the architecture's; parts in `unread` may."""
    found: list[str] = []
    for part, (prefix, _) in layout.parts.items():
        present = {name for name in names if name.startswith(prefix)}
        if part in unread or part not in architecture.parts or (not present and part in layout.optional):
            continue
        if not present:
            found.append(
                f"it holds no {part} ({prefix}*), get the file that includes it, or put the folder {part} of "
                "a diffusers version beside the file"
            )
            continue
        expected = _expected(architecture.parts[part], layout, part)
        for name, shapes in expected.items():
            if name not in present:
                if name not in layout.identities:
                    found.append(f"{name} is missing")
            elif (shape := header.tensors[names[name]].shape) not in shapes:
                found.append(f"{name} is {list(shape)} instead of {list(shapes[0])}{_reason(name)}")
        strange = {name for name in present - set(expected) if not UNREAD.match(name)}
        found.extend(f"{name} is one too many" for name in sorted(strange))
    return found


def _reason(name: str) -> str:
    if name == f"{DENOISER}input_blocks.0.0.weight":
        return " (an inpainting, depth or editing model?)"
    return ""


def _expected(config: Mapping[str, Any], layout: Layout, part: str) -> dict[str, list[tuple[int, ...]]]:
    """Name in the file -> the shapes it may have."""
    with torch.device("meta"):
        state = architectures.build(config, part).state_dict()
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for entry in layout.entries(part, config, state):
        shape = tuple(entry.way.join([state[name] for name in entry.ours]).shape)
        shapes[entry.theirs] = [shape, shape[:2]] if entry.way is CONVOLVED else [shape]
    return shapes


def prediction_of(
    path: Path, header: Header, layout: Layout, get: Callable[[str], Tensor], given: str | None
) -> tuple[str | None, str]:
    """What the denoiser predicts, as schedulers call it, or none if nothing tells; and a note, or "".

    In this order: what the caller says, modelspec's metadata, the marker "v_pred"; for SD 2.x the weights.
    `get` reads a tensor of the file.
    """
    said = given or header.metadata.get("modelspec.prediction_type")
    if said is not None:
        if layout.family == "sd3":
            if given is None:
                return None, ""
            raise LiveryError(f"{path}: prediction '{given}' does not fit SD3, which predicts the flow")
        if said.lower() not in PREDICTIONS:
            raise LiveryError(f"{path}: prediction '{said}' is not one livery knows: epsilon or v")
        return PREDICTIONS[said.lower()], ""
    if header.metadata.get("modelspec.architecture", "").endswith("-v") or "v_pred" in header.tensors:
        return "v_prediction", ""
    if layout.name == "sd2" and SPREAD in header.tensors:
        return _by_spread(path, float(get(SPREAD).float().std(correction=0)))
    return None, ""


def _by_spread(path: Path, spread: float) -> tuple[str, str]:
    """SD 2.x's v-prediction models have a wider spread in one tensor; ComfyUI tells them by that too."""
    velocity = spread > SPREAD_OF_V
    what, other = ("v-prediction", "epsilon") if velocity else ("epsilon", "v-prediction")
    note = (
        f"{path.name} does not say what it predicts: taken for {what}, because the spread of {SPREAD} is "
        f"{spread:.3f} ({'over' if velocity else 'not over'} {SPREAD_OF_V}); if pictures come out wrong, "
        f"load it with prediction {other}"
    )
    return ("v_prediction" if velocity else "epsilon"), note


def schedule(config: Mapping[str, Any], predicts: str | None, zero_snr: bool) -> dict[str, Any]:
    """The scheduler's configuration with what the file told. `zero_snr`: it has the marker "ztsnr"."""
    told = dict(config)
    if predicts and "prediction_type" in told:
        told["prediction_type"] = predicts
    return _ending_in_noise(told) if zero_snr and "beta_start" in told else told


def _ending_in_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule that ends in pure noise, Lin et al. 2023 (arXiv:2305.08891), as the marker "ztsnr" says."""
    if config.get("rescale_betas_zero_snr"):
        return dict(config)
    kept = {key: config[key] for key in (*SCHEDULE, "prediction_type") if key in config}
    return {
        **kept,
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }


def modelspec(
    architecture: Architecture, title: str, resolution: int, predicts: str | None
) -> dict[str, str]:
    """https://github.com/Stability-AI/ModelSpec, version 1.0.1."""
    said = {
        "sai_model_spec": "1.0.1",
        "architecture": _spec_name(architecture, predicts),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{resolution}x{resolution}",
        **({"prediction_type": "v" if predicts == "v_prediction" else "epsilon"} if predicts else {}),
    }
    return {f"modelspec.{key}": value for key, value in said.items()}


def _spec_name(architecture: Architecture, predicts: str | None) -> str:
    transformer = architecture.parts.get("transformer", {})
    third = "3-5-large" if transformer.get("qk_norm") else "3-medium"
    return {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if predicts == "v_prediction" else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
        "sd3": f"stable-diffusion-{'3-5-medium' if transformer.get('dual_attention_layers') else third}",
    }[architecture.layout]
