"""The noise law: how noise mixes into latents, what the network must answer, and how much each answer counts.

One small value holds both what training needs (`mix`, `target`, `weight`) and what sampling needs
(`clean`), so the two cannot disagree. `from_config` makes it from a model's own scheduler configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from livery.nouns import LiveryError


class NoiseProcess(Protocol):
    """Latents are [B, C, h, w]; `t` is [B], from `sample_timesteps`, on the latents' device."""

    @property
    def timesteps(self) -> int:
        """How many noise levels there are; the highest is the noisiest."""
        ...

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n noise levels to train on, [n], on the CPU."""
        ...

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy latents that the network sees."""
        ...

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be."""
        ...

    def weight(self, t: Tensor, min_snr_gamma: float) -> Tensor:
        """How much each row's squared error counts, [B]; 1 everywhere when gamma is 0."""
        ...

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean latents that an output claims: the inverse of `mix` and `target`."""
        ...


@dataclass(frozen=True, eq=False)
class Diffusion:
    """Discrete variance-preserving noise, Ho et al. 2020 (arXiv:2006.11239), equation 4.

    noisy = sqrt(a_t) clean + sqrt(1 - a_t) noise, with a_t (`alpha_bar`, [T], falling, in [0, 1]) the
    product of 1 - beta up to t. The signal-to-noise ratio is a_t / (1 - a_t).
    """

    prediction: ClassVar[str]
    alpha_bar: Tensor

    @property
    def timesteps(self) -> int:
        return len(self.alpha_bar)

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform integers in [0, T)."""
        return torch.randint(self.timesteps, (n,), generator=generator)

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread = self._parts(t)
        return signal * clean + spread * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]: 0 where nothing of the picture is left."""
        level = self.alpha_bar.to(t.device)[t]
        return level / (1 - level)

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each [B, 1, 1, 1]."""
        level = self.alpha_bar.to(t.device)[t][:, None, None, None]
        return level.sqrt(), (1 - level).sqrt()


class Epsilon(Diffusion):
    """The network answers the noise, Ho et al. 2020, equation 14."""

    prediction = "epsilon"

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def weight(self, t: Tensor, min_snr_gamma: float) -> Tensor:
        """min(snr, gamma) / snr: Hang et al. 2023 (arXiv:2303.09556), section 3.4; 1 where snr is 0."""
        if not min_snr_gamma:
            return torch.ones_like(t, dtype=torch.float32)
        return (min_snr_gamma / self.snr(t)).clamp(max=1)

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """(noisy - sqrt(1 - a) output) / sqrt(a): Ho et al. 2020, equation 15. Infinite where a is 0."""
        signal, spread = self._parts(t)
        return (noisy - spread * output) / signal


class Velocity(Diffusion):
    """The network answers v = sqrt(a) noise - sqrt(1 - a) clean: Salimans & Ho 2022 (arXiv:2202.00512), 4."""

    prediction = "v_prediction"

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread = self._parts(t)
        return signal * noise - spread * clean

    def weight(self, t: Tensor, min_snr_gamma: float) -> Tensor:
        """min(snr, gamma) / (snr + 1): Hang et al. 2023, section 3.4."""
        if not min_snr_gamma:
            return torch.ones_like(t, dtype=torch.float32)
        snr = self.snr(t)
        return snr.clamp(max=min_snr_gamma) / (snr + 1)

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """sqrt(a) noisy - sqrt(1 - a) output: Salimans & Ho 2022, appendix D."""
        signal, spread = self._parts(t)
        return signal * noisy - spread * output


PREDICTIONS: Mapping[str, type[Epsilon] | type[Velocity]] = {
    law.prediction: law for law in (Epsilon, Velocity)
}


def from_config(config: Mapping[str, Any], where: str = "scheduler") -> Epsilon | Velocity:
    """The noise law of a diffusers scheduler configuration; `where` leads the error.

    Keys left out mean what they mean to diffusers' DDPMScheduler. Raises LiveryError for a schedule or a
    prediction type that is not known here.
    """
    prediction = str(config.get("prediction_type") or "epsilon")
    if prediction not in PREDICTIONS:
        raise LiveryError(
            f"{where}: prediction_type '{prediction}' is not one livery trains: {', '.join(PREDICTIONS)} are"
        )
    alpha_bar = torch.cumprod(1 - _betas(config, where), dim=0)
    if config.get("rescale_betas_zero_snr"):
        alpha_bar = _end_in_pure_noise(alpha_bar)
    return PREDICTIONS[prediction](alpha_bar)


def _betas(config: Mapping[str, Any], where: str) -> Tensor:
    """Noise added at each level, [T] in (0, 1)."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    count = int(config.get("num_train_timesteps", 1000))
    low, high = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(low, high, count)
        case "scaled_linear":  # Rombach et al. 2022: linear in the square root
            return torch.linspace(low**0.5, high**0.5, count).square()
        case "squaredcos_cap_v2":
            return _cosine_betas(count)
        case other:
            raise LiveryError(
                f"{where}: beta_schedule '{other}' is not known: linear, scaled_linear, squaredcos_cap_v2 are"
            )


def _cosine_betas(count: int, highest: float = 0.999) -> Tensor:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17, capped below 1."""

    def level(part: float) -> float:
        return math.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - level((i + 1) / count) / level(i / count) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32).clamp(max=highest)


def _end_in_pure_noise(alpha_bar: Tensor) -> Tensor:
    """Shift and stretch so that the last level holds no signal: Lin et al. 2023, arXiv:2305.08891, alg. 1."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
