"""What a machine does per second, draws and costs: measured where that is quick, else stated."""

from __future__ import annotations

import shutil
import subprocess
import time

import torch

HOST_WATTS = 100.0
"""Assumed for a computer at work without its card; livery cannot measure it."""
CARD_WATTS = 300.0
"""Assumed for a card whose limit cannot be read."""
CARD_SHARE = 0.85
"""Of its power limit, what a card draws while it trains."""
DOLLARS_PER_HOUR = {"H200": 4.0, "H100": 3.0, "A100": 1.8, "L40": 1.0, "A10": 0.8, "4090": 0.5, "3090": 0.3}
"""Round rents of cards, to be overridden with the price that you pay."""


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of large matrix products here, 2 per product: measured."""
    side = 4096 if device.type == "cuda" else 768
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    _ = left @ right
    times: list[float] = []
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        _ = left @ right
        _wait(device)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watts(device: torch.device) -> tuple[float, str]:
    """What the machine draws while it trains, and where the number is from."""
    if device.type != "cuda":
        return HOST_WATTS, f"{HOST_WATTS:.0f} W assumed for the whole computer"
    limit = _power_limit(device)
    if limit is None:
        return (
            CARD_WATTS + HOST_WATTS,
            f"{CARD_WATTS:.0f} W assumed for the card, {HOST_WATTS:.0f} W for the rest",
        )
    share = f"{CARD_SHARE:.0%} of the card's limit of {limit:.0f} W"
    return CARD_SHARE * limit + HOST_WATTS, f"{share}, {HOST_WATTS:.0f} W assumed for the rest"


def _power_limit(device: torch.device) -> float | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, f"--id={device.index or 0}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def rent(name: str) -> float | None:
    """Dollars per hour for a card of this name; none for machines that nobody rents out by name."""
    return next((price for part, price in DOLLARS_PER_HOUR.items() if part in name), None)
