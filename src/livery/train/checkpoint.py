"""Checkpoints: the tuners, the optimiser and the run so far in one safetensors file, with a manifest.

The manifest names every file that a run needs to go on and its SHA-256. It is written last, so a
checkpoint without one, or one that does not match its hash, is not a checkpoint: the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from livery.files import write_bytes
from livery.models import weights_file
from livery.models.weights_file import Made
from livery.nouns import LiveryError, Noun, Sample, Sha256, Step, Validation

KEPT = 2


class Identity(Noun):
    """What a run is of: a checkpoint fits no other."""

    recipe: Sha256
    dataset: Sha256
    base: Sha256


class Journal(Noun):
    """What a run has told and cost so far; its step is the number of steps it lists."""

    identity: Identity
    steps: tuple[Step, ...]
    validations: tuple[Validation, ...]
    samples: tuple[Sample, ...]
    seconds: float
    peak_memory_bytes: int


@dataclass
class Progressed:
    """A run between two steps: its journal and its tensors by name."""

    journal: Journal
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write atomically: a kill leaves the old file or the new one, never a part. The file's SHA-256.

    Tensors come to the host one at a time, as they are written.
    """
    made = {name: Made(one.dtype, tuple(one.shape), lambda one=one: one) for name, one in tensors.items()}
    return weights_file.write(path, made, metadata or {})


def write(folder: Path, journal: Journal, tensors: Mapping[str, Tensor], needed: Sequence[Path] = ()) -> None:
    """Write the checkpoint of the journal's step; of the older ones only the last stays.

    `needed` are other files of the folder that a run from here on cannot do without.
    """
    path = folder / f"step-{len(journal.steps):08d}.safetensors"
    hashes = {other.name: sha256_of_file(other) for other in needed}
    hashes[path.name] = write_tensors(path, tensors, {"journal": journal.model_dump_json()})
    write_bytes(path.with_suffix(".json"), json.dumps(hashes).encode())
    for old in _manifests(folder)[:-KEPT]:
        _remove(old)


def latest(folder: Path, identity: Identity, device: torch.device) -> Progressed | None:
    """The last whole checkpoint; none when there is none. Raises LiveryError if it is of another run."""
    for manifest in reversed(_manifests(folder)):
        found = _read(manifest, device)
        if found:
            _check(folder, found.journal.identity, identity)
            return found
    return None


def needed(folder: Path) -> set[str]:
    """Names of all files that the manifests there name."""
    return {name for manifest in _manifests(folder) for name in _hashes(manifest)}


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint there, rising."""
    return [_step_of(manifest) for manifest in _manifests(folder)]


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for manifest in _manifests(folder):
        if _step_of(manifest) > step:
            _remove(manifest)


def clear(folder: Path) -> None:
    """Forget every checkpoint."""
    forget_after(folder, -1)
    for path in [*folder.glob("step-*.safetensors"), *folder.glob("best-*.safetensors")]:
        path.unlink()


def sweep(folder: Path) -> None:
    """Remove what a kill left half-written."""
    for path in [*folder.glob(".step-*"), *folder.glob(".best-*")]:
        path.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.json"))


def _step_of(manifest: Path) -> int:
    return int(manifest.stem.removeprefix("step-"))


def _remove(manifest: Path) -> None:
    """The manifest first: a kill in between leaves a file that nothing calls a checkpoint."""
    manifest.unlink(missing_ok=True)
    manifest.with_suffix(".safetensors").unlink(missing_ok=True)


def _hashes(manifest: Path) -> dict[str, str]:
    """File name -> SHA-256; nothing when the manifest is damaged."""
    try:
        found = json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(manifest: Path, device: torch.device) -> Progressed | None:
    """The checkpoint; none when a byte of it or of what it needs is not what was written."""
    hashes, path = _hashes(manifest), manifest.with_suffix(".safetensors")
    try:
        if path.name not in hashes:
            return None
        if any(sha256_of_file(manifest.with_name(name)) != wanted for name, wanted in hashes.items()):
            return None
        with safe_open(path, "pt", device=str(device)) as file:
            journal = Journal.model_validate_json(file.metadata()["journal"])
            return Progressed(journal, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError):
        return None


def _check(folder: Path, found: Identity, wanted: Identity) -> None:
    other = [name for name in Identity.model_fields if getattr(found, name) != getattr(wanted, name)]
    if other:
        raise LiveryError(
            f"{folder}: the checkpoint there is of a run with another {' and '.join(other)}; "
            "train in another folder, or start anew without resuming."
        )
