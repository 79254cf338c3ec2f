"""What the machine offers a model: which precision pays, how much memory was used."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from livery.nouns import LiveryError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """Turn "auto" into what pays on this device.

    bf16 pays where the processor multiplies it in hardware: CUDA cards since Ampere, CPUs with
    AVX512-BF16 or AMX. Elsewhere it is emulated and slower than fp32. fp16 is for older CUDA cards, and
    needs its losses scaled; auto never takes it. Raises LiveryError for fp16 on another device.
    """
    if precision == "fp16" and device.type != "cuda":
        raise LiveryError(f"precision 'fp16' is for CUDA cards, this is {device.type}: take 'auto'")
    if precision != "auto":
        return precision
    return "bf16" if _has_bf16(device) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def autocast(device: torch.device, precision: Precision, cells: int) -> Iterator[None]:
    """Matrix products and convolutions in half precision where asked for or where it pays; weights stay.

    On a CPU, bf16 attention over few latent cells is faster written out than fused. `cells` counts
    the latent cells of one picture; above 1024 the written-out scores would take too much memory.

    Halves of weights that learn are not kept: none is used twice in a pass, and those of a whole model would
    live to the end of it, whatever gradient checkpointing saves.
    """
    chosen = resolve(precision, device)
    if chosen == "fp32":
        yield
        return
    plain = device.type == "cpu" and cells <= 1024
    with (
        torch.autocast(device.type, HALF[chosen], cache_enabled=False),
        sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
    ):
        yield


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the host to the device, without waiting for what the device is at: by pinned memory."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the card on CUDA, else of this process; 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no getrusage
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def free_memory_bytes(device: torch.device) -> int:
    """What a run may still take: free on the card on CUDA, else in this machine or its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is as good as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (_container(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _container(path: str) -> int | None:
    """A number that the container's control group states; none where it states none."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where it cannot be told."""
    import psutil

    return psutil.Process().memory_info().rss


def device_name(device: torch.device) -> str:
    """For records: "cuda: NVIDIA H200", "cpu: AMD EPYC, 2 cores"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    name = str(torch.cpu.get_capabilities().get("cpu_name") or "unnamed")
    return f"cpu: {name}, {os.cpu_count()} cores"
