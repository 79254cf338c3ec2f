"""What this machine has, what the models that people train would need, and what follows for the user."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from livery.nouns import LiveryError, Noun, unknown_key

if TYPE_CHECKING:
    from torch import nn

GIB = 1 << 30
OPTIONAL = {"resvg_py": "rebuilding the starter model (extra: starter)"}


class Finding(Noun):
    """One thing that was looked at; `means` says what follows for the user."""

    what: str
    found: str
    means: str
    level: Literal["ok", "note", "problem"] = "ok"


def examine(workspace: Path) -> Iterator[Finding]:
    """Python, torch, devices, memory, disk, the starter model, optional parts."""
    yield _python()
    yield from _torch()
    yield _memory()
    yield _disk(workspace)
    yield _starter()
    for module, purpose in OPTIONAL.items():
        there = importlib.util.find_spec(module) is not None
        means = f"used for {purpose}" if there else f"needed only for {purpose}"
        yield Finding(what=module, found="installed" if there else "not installed", means=means)


def _python() -> Finding:
    return Finding(what="Python", found=platform.python_version(), means="fine")


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        means = "nothing can be trained or drawn: install livery with its dependencies"
        yield Finding(what="torch", found="not installed", means=means, level="problem")
        return
    yield Finding(what="torch", found=importlib.metadata.version("torch"), means="fine")
    # Beside a CPU build of torch, torchvision breaks the import of diffusers and transformers.
    if importlib.util.find_spec("torchvision") is not None and "cpu" in importlib.metadata.version("torch"):
        means = "it can break diffusers beside a CPU build of torch: pip uninstall torchvision"
        yield Finding(what="torchvision", found="installed", means=means, level="problem")
    yield _device()


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        size = card.total_memory / GIB
        fits = "SD 1.x and 2.x" if size >= 8 else "the starter, and SD 1.x with care"
        means = f"enough to train LoRA on {fits}; `livery estimate` says what larger models take"
        return Finding(what="device", found=f"{card.name}, {size:.0f} GiB", means=means)
    from livery.models.device import device_name, resolve

    place = torch.device("cpu")
    fast = resolve("auto", place) == "bf16"
    means = "the starter trains in minutes; Stable Diffusion itself takes hours and wants a GPU"
    return Finding(
        what="device",
        found=f"{device_name(place)}, bf16 {'yes' if fast else 'no'}",
        means=means if fast else f"{means}; without bf16 all takes about twice as long",
        level="note",
    )


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):
        return Finding(what="memory", found="unknown", means="the demo needs 4 GiB")
    if total < 4:
        return Finding(what="memory", found=f"{total:.1f} GiB", means="the demo needs 4 GiB", level="problem")
    means = "enough for the starter" if total < 16 else "enough for the starter and for SD 1.x in fp32"
    return Finding(what="memory", found=f"{total:.1f} GiB", means=means)


def _disk(workspace: Path) -> Finding:
    place = workspace if workspace.exists() else workspace.parent
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:.0f} GiB free at {place}"
    if free < 2:
        return Finding(what="disk", found=found, means="the workspace needs some GiB free", level="problem")
    return Finding(what="disk", found=found, means="fine")


def _starter() -> Finding:
    from livery.starter import brand_folder

    folder = brand_folder().parent
    missing = [part for part in ("base", "judge", "openmoji") if not (folder / part).is_dir()]
    if missing:
        means = "install livery from its wheel or a full clone"
        return Finding(what="starter", found=f"lacks {', '.join(missing)}", means=means, level="problem")
    return Finding(what="starter", found="complete", means="`livery demo` works with the network cut")


# ------------------------------------------------------------------ dry runs


def dry_run(name: str, rank: int = 16) -> Iterator[Finding]:
    """Real models built on the meta device: parameters per part, and a LoRA of this rank. Seconds, no memory.

    `name` is a family ("sd1", "sdxl", "sd3": all its models) or one model ("sd3.5-large"). Raises LiveryError
    with the nearest name.
    """
    from livery import plugins
    from livery.models import architectures

    models = (name,) if name in architectures.NAMES else architectures.of_family(name)
    if not models:
        known = list(dict.fromkeys([*plugins.families(), *architectures.NAMES]))
        raise LiveryError(f"--family: {unknown_key(name, known)}".replace("key", "name"))
    for model in models:
        shapes = architectures.architecture(model)
        parts = architectures.meta_parts(model)
        for part, module in parts.items():
            number = architectures.count(module)
            yield Finding(
                what=f"{model}: {part}",
                found=f"{number:,} parameters",
                means=f"{_size(2 * number)} in half precision",
            )
        layers, number = lora_size(parts["denoiser"], plugins.families()[shapes.family].lora_targets, rank)
        yield Finding(
            what=f"{model}: LoRA",
            found=f"rank {rank} on {layers} layers, {number:,} parameters",
            means=f"an adapter of {_size(2 * number)} in half precision",
        )


def lora_size(module: nn.Module, targets: str, rank: int) -> tuple[int, int]:
    """How many layers a LoRA adapts, and how many weights it has: A [rank, in], B [out, rank] for each.

    `targets` is matched against whole names of linear and convolution layers.
    """
    import re

    from torch import nn

    pattern, layers, number = re.compile(targets), 0, 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and pattern.fullmatch(name):
            outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
            layers, number = layers + 1, number + rank * (inputs + outputs)
    return layers, number


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"
