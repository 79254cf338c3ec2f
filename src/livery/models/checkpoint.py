"""Base models as folders: find a diffusers folder, check it, read its parts, and name its content.

Nothing here fetches anything unless the caller allows the network, and nothing reads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from livery.nouns import LiveryError, sha256_of

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
INDEX = "model_index.json"


class Pretrained(Protocol):
    """A class of diffusers or transformers that reads a folder."""

    __name__: str

    def from_pretrained(self, source: Path, **options: Any) -> Any: ...


def find_folder(source: str | Path, *, allow_network: bool = False) -> Path:
    """The diffusers folder that `source` names: a folder, or a hub id ("owner/name").

    A hub id is looked for among what was fetched before; it is fetched only when `allow_network`.
    Raises LiveryError when there is no such folder.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise LiveryError(f"{source}: a file where a diffusers folder is wanted; give a folder with {INDEX}")
    if _looks_like_hub_id(str(source)):
        return _from_hub(str(source), allow_network)
    raise LiveryError(
        f"{source}: no such folder or file; give 'starter', a diffusers folder with {INDEX}, or a checkpoint"
    )


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _from_hub(name: str, allow_network: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = ["*.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        return Path(
            snapshot_download(
                name,
                local_files_only=not allow_network,
                allow_patterns=wanted,
                ignore_patterns=["*non_ema*", "safety_checker/*"],
            )
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        cure = f"the hub said: {_first_line(error)}" if allow_network else "allow the network to fetch it"
        raise LiveryError(f"{name}: not a folder here, and not fetched before; {cure}") from None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder. Raises LiveryError when it is missing or broken."""
    try:
        value = json.loads((folder / name).read_text("utf-8"))
    except OSError:
        raise LiveryError(f"{folder}: {name} is missing; give a whole diffusers folder") from None
    except ValueError:
        raise LiveryError(f"{folder / name}: not valid JSON; get the folder again") from None
    if not isinstance(value, dict):
        raise LiveryError(f"{folder / name}: not a JSON object; get the folder again")
    return value


def pipeline_name(folder: Path) -> str:
    """The diffusers pipeline class that the folder says it is."""
    if not (folder / INDEX).is_file():
        single = next((str(path.name) for path in sorted(folder.glob("*.safetensors"))), None)
        found = f"; name the file itself, {single}" if single else "; give a diffusers folder, or one file"
        raise LiveryError(f"{folder}: no {INDEX} in it{found}")
    return str(read_json(folder, INDEX).get("_class_name", ""))


def require_parts(folder: Path, weights: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Check that every part is there, before any weight is read.

    `weights` maps a part to the stem of its weight files, `files` maps a part to a file it must hold.
    Raises LiveryError that names what is missing, or that the weights are pickles.
    """
    for part, name in {**dict.fromkeys(weights, "config.json"), **files}.items():
        if not (folder / part / name).is_file():
            raise LiveryError(f"{folder}: {part}/{name} is missing; give a whole diffusers folder")
    for part, stem in weights.items():
        if any((folder / part).glob(f"{stem}*.safetensors")):
            continue
        pickles = [path.name for kind in PICKLES for path in (folder / part).glob(kind)]
        if pickles:
            raise LiveryError(
                f"{folder / part / pickles[0]}: a pickle, which can run code when read; convert the folder "
                "with diffusers' save_pretrained(..., safe_serialization=True) or get its safetensors version"
            )
        raise LiveryError(f"{folder}: {part}/{stem}.safetensors is missing; give a whole diffusers folder")


def read_part(kind: Pretrained, folder: Path, part: str, stem: str) -> nn.Module:
    """One part with its weights as float32 on the CPU, frozen, in evaluation mode.

    Raises LiveryError when a file is broken or lacks weights: diffusers itself would fill them at random.
    """
    try:
        with quiet():
            module, info = kind.from_pretrained(
                folder / part,
                local_files_only=True,
                use_safetensors=True,
                variant=_variant(folder / part, stem),
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LiveryError(f"{folder / part}: cannot be read as {kind.__name__}: {_reason(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise LiveryError(
            f"{folder / part}: {len(missing)} weights are missing, first {missing[0]}; get the folder again"
        )
    return module.float().eval().requires_grad_(False)


def _reason(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):  # their advice would fill weights at random
        return "its weights have other shapes than its config.json says"
    return _first_line(error)


def _variant(folder: Path, stem: str) -> str | None:
    """None when there are plain weight files; else what stands between stem and ending: "fp16"."""
    names = sorted(path.name for path in folder.glob(f"{stem}*.safetensors"))
    if any(name == f"{stem}.safetensors" or name.startswith(f"{stem}-") for name in names):
        return None
    return names[0].removeprefix(f"{stem}.").removesuffix(".safetensors").split("-")[0].split(".")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports of the libraries: errors are ours to tell."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    levels = [(each, each.get_verbosity()) for each in (logging, diffusers_logging)]
    logging.disable_progress_bar()
    for each, _ in levels:
        each.set_verbosity_error()
    try:
        yield
    finally:
        for each, level in levels:
            each.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def fingerprint(parts: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, and over JSON facts that shape the output.

    Each tensor is hashed on its own, on all cores (gigabytes take seconds), then the sorted list.
    """
    tensors = {f"{part}.{name}": t for part, module in parts.items() for name, t in _tensors(module)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    return sha256_of({"tensors": digests, "facts": dict(facts)})


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    # transformers 4 named CLIP's weights text_model.*, transformers 5 does not: the same weights either way.
    return [(name.removeprefix("text_model."), tensor) for name, tensor in module.state_dict().items()]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    digest = hashlib.sha256(head)
    digest.update(flat.view(torch.uint8).numpy().data)  # hashlib lets other threads run meanwhile
    return digest.hexdigest()
