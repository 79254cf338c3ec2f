"""Find out what family a base model is of, and load it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from livery import plugins
from livery.models import checkpoint
from livery.models.backbone import Backbone
from livery.models.single_file import load_single_file
from livery.nouns import LiveryError

STARTER = "starter"

# What people call the pipelines that no family here reads; the first that fits.
KNOWN = {
    "StableDiffusionXLImg2Img": "SDXL refiner or image-to-image",
    "StableDiffusionXL": "special SDXL",
    "StableDiffusion3": "special Stable Diffusion 3",
    "StableDiffusion": "special Stable Diffusion",
    "Flux": "FLUX",
}


def load_backbone(
    source: str | Path, family: str | None = None, device: str = "cpu", allow_network: bool = False
) -> Backbone:
    """The base model that `source` names: "starter", a diffusers folder, a single-file checkpoint
    (.safetensors), or a hub id ("owner/name").

    `family` is a registered name; by default it is read from the folder's model_index.json, or told from the
    file's tensors. A hub id is fetched only when `allow_network`. Raises LiveryError when nothing is there
    or no family reads it.
    """
    if source == STARTER:
        source = starter_folder()
    if (file := Path(source).expanduser()).is_file():
        return load_single_file(file, family=family, device=device)
    folder = checkpoint.find_folder(source, allow_network=allow_network)
    return _family(folder, family).load(folder, device=device, allow_network=allow_network)


def starter_folder() -> Path:
    """The built-in base model inside the package. Raises LiveryError when this installation lacks it."""
    folder = Path(str(importlib.resources.files("livery"))) / "starter" / "base"
    if not (folder / checkpoint.INDEX).is_file():
        raise LiveryError(
            "starter: the built-in base model is not in this installation; install livery from its wheel or "
            "a full clone, or name a diffusers folder or a checkpoint file as the base"
        )
    return folder


def _family(folder: Path, name: str | None) -> type[Backbone]:
    families = plugins.families()
    if name is not None:
        return families[name]
    pipeline = checkpoint.pipeline_name(folder)
    for known in families:
        if pipeline in families[known].pipelines:
            return families[known]
    what = next((people for start, people in KNOWN.items() if pipeline.startswith(start)), pipeline)
    raise LiveryError(
        f"{folder}: a {what} model ({pipeline}); this livery reads the families {', '.join(families)}"
    )
