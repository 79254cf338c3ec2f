"""One training loop for every stage: deterministic by seed and step, resumable after a kill."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device().type, torch.bfloat16)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine down to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    part = path.with_suffix(".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


class Fit:
    """Weights, optimiser state, an optional average of the weights, and the step they are at."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        build: Path,
        *,
        steps: int,
        peak: float,
        warmup: int,
        ema: float | None = None,
        weight_decay: float = 0.01,
    ) -> None:
        self.name, self.module, self.path = name, module.to(device()), build / f"{name}.fit.safetensors"
        self.steps, self.peak, self.warmup, self.decay = steps, peak, warmup, ema
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()} if ema else {}
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load()

    def run(self, loss_of: Callable[[int], Tensor], *, every: float = 60.0) -> Iterator[tuple[int, float]]:
        """Train to the last step, yielding (step, mean loss since the last report)."""
        started, saved, total, count = time.monotonic(), time.monotonic(), 0.0, 0
        while self.step < self.steps:
            rate = learning_rate(self.step, self.steps, self.peak, self.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._follow()
            self.step, total, count = self.step + 1, total + float(loss.detach()), count + 1
            if time.monotonic() - saved > every or self.step == self.steps:
                now = time.monotonic()
                self.seconds += now - started
                self.save()
                started = saved = time.monotonic()
                yield self.step, total / count
                total, count = 0.0, 0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the module, for the length of a `with`."""
        live = {k: v.clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        try:
            yield
        finally:
            self.module.load_state_dict(live)

    @torch.no_grad()
    def _follow(self) -> None:
        if self.decay is None:
            return
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        names = [name for name, _ in self.module.named_parameters()]
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{names[index]}.{k}": v for k, v in state.items()}
        write(tensors, self.path, {"step": str(self.step), "seconds": f"{self.seconds:.1f}"})

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        tensors = load_file(self.path, device=str(device()))
        self.module.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        for name in self.average:
            self.average[name] = tensors[f"average.{name}"].clone()
        for name, parameter in self.module.named_parameters():
            if f"adam.{name}.step" not in tensors:  # a parameter that the loss never reaches
                continue
            state = {k: tensors[f"adam.{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            state["step"] = state["step"].cpu() if device().type == "cpu" else state["step"]
            self.optimizer.state[parameter] = state
