"""Checkpoints: one safetensors file holds the tuners, the optimiser and the run so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from livery.files import write_bytes
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write atomically: a kill leaves the old file or the new one, never a part."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata))


def write(folder: Path, journal: Journal, tensors: Mapping[str, Tensor]) -> None:
    """Write the checkpoint of the journal's step; of the older ones only the last stays."""
    path = folder / f"step-{len(journal.steps):08d}.safetensors"
    write_tensors(path, tensors, {"journal": journal.model_dump_json()})
    for old in _files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)


def latest(folder: Path, identity: Identity, device: torch.device) -> Progressed | None:
    """The last readable checkpoint; none when there is none. Raises LiveryError if it is of another run."""
    for path in reversed(_files(folder)):
        try:
            found = _read(path, device)
        except (SafetensorError, ValidationError, KeyError, TypeError):
            continue  # damaged on disk: the one before it will do
        _check(folder, found.journal.identity, identity)
        return found
    return None


def clear(folder: Path) -> None:
    """Forget every checkpoint."""
    for path in _files(folder):
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a kill left half-written."""
    for path in folder.glob(".step-*.safetensors.*"):
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _read(path: Path, device: torch.device) -> Progressed:
    with safe_open(path, "pt", device=str(device)) as file:
        journal = Journal.model_validate_json(file.metadata()["journal"])
        return Progressed(journal, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _check(folder: Path, found: Identity, wanted: Identity) -> None:
    other = [name for name in Identity.model_fields if getattr(found, name) != getattr(wanted, name)]
    if other:
        raise LiveryError(
            f"{folder}: the checkpoint there is of a run with another {' and '.join(other)}; "
            "train in another folder, or start anew without resuming."
        )
