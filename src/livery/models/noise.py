"""The noise law: how noise mixes into latents, what the network must answer, and how much each answer counts.

One small value holds both what training needs (`mix`, `target`, `weight`) and what sampling needs
(`clean`), so the two cannot disagree. `from_config` makes it from a model's own scheduler configuration,
`for_recipe` changes it as a recipe asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from livery.nouns import LiveryError, LossSpec, Recipe

SNR_RANGE = (1e-3, 1e3)
"""Bounds of the signal-to-noise ratio where a weight divides by its root; the upper is kohya sd-scripts'."""


class NoiseProcess(Protocol):
    """Latents are [B, C, h, w]; `t` is [B], from `sample_timesteps` or `levels`, on the latents' device."""

    def to(self, device: torch.device | str) -> Self:
        """The same law with its table, if it has one, on a device: spares a copy in each step."""
        ...

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n noise levels to train on, [n], on the CPU."""
        ...

    def levels(self, n: int) -> Tensor:
        """n noise levels spread evenly from the cleanest to the noisiest, [n], on the CPU: for validation."""
        ...

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy latents that the network sees."""
        ...

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be."""
        ...

    def weight(self, t: Tensor, loss: LossSpec) -> Tensor:
        """How much each row's error counts, [B]: 1 everywhere when `loss.weighting` is 'none'."""
        ...

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean latents that an output claims: the inverse of `mix` and `target`."""
        ...


@dataclass(frozen=True, eq=False)
class Diffusion:
    """Discrete variance-preserving noise, Ho et al. 2020 (arXiv:2006.11239), equation 4.

    noisy = sqrt(a_t) clean + sqrt(1 - a_t) noise, with a_t (`alpha_bar`, [T], falling, in [0, 1]) the
    product of 1 - beta up to t. The signal-to-noise ratio is a_t / (1 - a_t). Levels are integers in
    [0, T), drawn uniformly or, with `logit` = (mean, std), where the logit of t / T is normal.
    """

    prediction: ClassVar[str]
    alpha_bar: Tensor
    logit: tuple[float, float] | None = None

    @property
    def timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alpha_bar)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, alpha_bar=self.alpha_bar.to(device))

    def ending_in_pure_noise(self) -> Self:
        """Shifted and stretched so that the last level has no signal: Lin et al. 2023, arXiv:2305.08891."""
        return replace(self, alpha_bar=_end_in_pure_noise(self.alpha_bar))

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Integers in [0, T)."""
        if self.logit is None:
            return torch.randint(self.timesteps, (n,), generator=generator)
        part = _logit_normal(n, self.logit, generator)
        return (part * self.timesteps).long().clamp(max=self.timesteps - 1)

    def levels(self, n: int) -> Tensor:
        return torch.tensor([(2 * i + 1) * self.timesteps // (2 * n) for i in range(n)])

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

    def weight(self, t: Tensor, loss: LossSpec) -> Tensor:
        """The weights of the papers, written for this prediction.

        'min-snr': min(snr, gamma) / snr, Hang et al. 2023 (arXiv:2303.09556), section 3.4; 1 where snr is 0.
        'debiased': 1 / sqrt(snr), Yu et al. 2023 (arXiv:2310.08442), with the ratio kept in SNR_RANGE.
        """
        if loss.weighting == "min-snr":
            return (loss.min_snr_gamma / self.snr(t)).clamp(max=1)
        if loss.weighting == "debiased":
            return self.snr(t).clamp(*SNR_RANGE).rsqrt()
        return torch.ones_like(t, dtype=torch.float32)

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

    def weight(self, t: Tensor, loss: LossSpec) -> Tensor:
        """The weights of `Epsilon`, times snr / (snr + 1): a squared error of v is that of the noise / that.

        'min-snr': min(snr, gamma) / (snr + 1), Hang et al. 2023, section 3.4.
        'debiased': sqrt(snr) / (snr + 1).
        """
        snr = self.snr(t)
        if loss.weighting == "min-snr":
            return snr.clamp(max=loss.min_snr_gamma) / (snr + 1)
        if loss.weighting == "debiased":
            return snr.sqrt() / (snr + 1)
        return torch.ones_like(t, dtype=torch.float32)

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """sqrt(a) noisy - sqrt(1 - a) output: Salimans & Ho 2022, appendix D."""
        signal, spread = self._parts(t)
        return signal * noisy - spread * output


@dataclass(frozen=True)
class Flow:
    """Rectified flow, Liu et al. 2022 (arXiv:2209.03003), as in SD3, Esser et al. 2024 (arXiv:2403.03206).

    noisy = (1 - t) clean + t noise, with t real in [0, 1] and 1 pure noise; the network answers
    noise - clean. Levels are drawn where the logit of t is normal (SD3, section 3.1; `logit` none =
    uniformly), then moved to more noise, t' = s t / (1 + (s - 1) t), for larger pictures (section 5.3.2).
    Min-SNR and debiased weights are not defined here: each row counts 1.
    """

    shift: float = 1.0
    logit: tuple[float, float] | None = (0.0, 1.0)

    def to(self, device: torch.device | str) -> Self:
        return self

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Reals in [0, 1]."""
        if self.logit is None:
            return self._shifted(torch.rand(n, generator=generator))
        return self._shifted(_logit_normal(n, self.logit, generator))

    def levels(self, n: int) -> Tensor:
        """Not shifted, so that runs with another shift are validated on the same levels."""
        return (torch.arange(n) + 0.5) / n

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        part = t[:, None, None, None]
        return (1 - part) * clean + part * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - clean

    def weight(self, t: Tensor, loss: LossSpec) -> Tensor:
        return torch.ones_like(t)

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return noisy - t[:, None, None, None] * output

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)


PREDICTIONS: Mapping[str, type[Epsilon] | type[Velocity]] = {
    law.prediction: law for law in (Epsilon, Velocity)
}


def from_config(config: Mapping[str, Any], where: str = "scheduler") -> Epsilon | Velocity | Flow:
    """The noise law of a diffusers scheduler configuration; `where` leads the error.

    Keys left out mean what they mean to diffusers' DDPMScheduler, or to FlowMatchEulerDiscreteScheduler
    where the configuration is of that. Raises LiveryError for a schedule or a prediction type that is not
    known here.
    """
    if "FlowMatch" in str(config.get("_class_name")) or "base_image_seq_len" in config:
        return _flow(config, where)
    prediction = str(config.get("prediction_type") or "epsilon")
    if prediction not in PREDICTIONS:
        raise LiveryError(
            f"{where}: prediction_type '{prediction}' is not one livery trains: {', '.join(PREDICTIONS)} are"
        )
    law = PREDICTIONS[prediction](torch.cumprod(1 - _betas(config, where), dim=0))
    return law.ending_in_pure_noise() if config.get("rescale_betas_zero_snr") else law


def for_recipe(law: NoiseProcess, recipe: Recipe) -> NoiseProcess:
    """The law as the recipe trains it: its levels, its shift, its end in pure noise.

    Raises LiveryError where the recipe asks for what this law does not have.
    """
    wanted = recipe.noise
    if isinstance(law, Flow):
        _refuse_for_flow(recipe.loss)
        law = law if wanted.shift is None else replace(law, shift=wanted.shift)
    elif wanted.shift is not None:
        raise LiveryError("noise.shift is for rectified flow, this base is a diffusion model: leave it out.")
    if recipe.loss.zero_terminal_snr:
        law = _without_last_signal(law)
    if isinstance(law, Diffusion | Flow) and wanted.timesteps:
        normal = wanted.timesteps == "logit-normal"
        return replace(law, logit=(wanted.logit_mean, wanted.logit_std) if normal else None)
    if isinstance(law, Flow) and law.logit:
        return replace(law, logit=(wanted.logit_mean, wanted.logit_std))
    return law


def _refuse_for_flow(loss: LossSpec) -> None:
    """'min-snr' is the recipe's default and so means 'none' here; the others were asked for."""
    if loss.weighting == "debiased":
        raise LiveryError("loss.weighting 'debiased' is not defined for rectified flow: set it to 'none'.")
    if loss.zero_terminal_snr:
        raise LiveryError("loss.zero_terminal_snr: rectified flow ends in pure noise already: leave it out.")


def _without_last_signal(law: NoiseProcess) -> NoiseProcess:
    if not isinstance(law, Velocity):
        raise LiveryError(
            "loss.zero_terminal_snr needs a v-prediction base: the noise cannot be told from pure noise, so "
            "this base would learn nothing at its last level. Leave it out."
        )
    return law.ending_in_pure_noise()


def _flow(config: Mapping[str, Any], where: str) -> Flow:
    for key in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal"):
        if config.get(key):
            raise LiveryError(f"{where}: {key} is not something livery trains with: give an SD3 scheduler")
    return Flow(shift=float(config.get("shift") or 1.0))


def _logit_normal(n: int, logit: tuple[float, float], generator: torch.Generator | None) -> Tensor:
    """[n] in (0, 1), the logit of which has this mean and standard deviation."""
    mean, std = logit
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


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
