"""The noise law against formulas written out by hand, and against diffusers' own DDPMScheduler."""

from typing import Any, cast

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from livery.models.noise import Epsilon, Velocity, from_config
from livery.nouns import LiveryError

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCHEDULES = [
    SD15,
    {},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
    {"trained_betas": [0.1, 0.2, 0.3]},
    {**SD15, "rescale_betas_zero_snr": True},
]


def rows(count: int = 5, shape: tuple[int, ...] = (3, 4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, *shape, generator=generator)


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_mix_and_target_are_those_of_diffusers(config, prediction):
    config = {**config, "prediction_type": prediction}
    law, theirs = from_config(config), cast(Any, DDPMScheduler(**config))
    clean, noise = rows()
    last = law.timesteps - 1
    t = torch.tensor([0, 1, last // 2, last - 1, last])
    assert law.timesteps == theirs.config["num_train_timesteps"] or "trained_betas" in config
    assert torch.allclose(law.mix(clean, noise, t), theirs.add_noise(clean, noise, t), atol=1e-5)
    wanted = noise if prediction == "epsilon" else theirs.get_velocity(clean, noise, t)
    assert torch.allclose(law.target(clean, noise, t), wanted, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_inverts_mix_and_target(prediction):
    law = from_config({**SD15, "prediction_type": prediction})
    clean, noise = rows()
    t = torch.tensor([0, 10, 250, 700, 900])
    claimed = law.clean(law.mix(clean, noise, t), law.target(clean, noise, t), t)
    assert torch.allclose(claimed, clean, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers(prediction, gamma):
    law = from_config({**SD15, "prediction_type": prediction})
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    level = torch.cumprod(1 - betas, 0)
    t = torch.tensor([0, 100, 500, 999])
    for row, weight in zip(t, law.weight(t, gamma), strict=True):
        snr = float(level[row] / (1 - level[row]))
        wanted = min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
        assert float(weight) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_no_gamma_weighs_all_rows_alike(prediction):
    law = from_config({**SD15, "prediction_type": prediction})
    assert law.weight(torch.tensor([0, 999]), 0).tolist() == [1, 1]


def test_pure_noise_has_finite_weights_and_no_signal():
    config = {**SD15, "rescale_betas_zero_snr": True}
    last = torch.tensor([999])
    assert float(from_config(config).weight(last, 5.0)) == 1
    velocity = from_config({**config, "prediction_type": "v_prediction"})
    assert float(velocity.weight(last, 5.0)) == 0
    clean, noise = rows(1)
    assert torch.equal(velocity.mix(clean, noise, last), noise)


def test_timesteps_cover_the_range_and_follow_their_generator():
    law = from_config({"num_train_timesteps": 10})
    drawn = law.sample_timesteps(500, torch.Generator().manual_seed(3))
    assert sorted(set(drawn.tolist())) == list(range(10))
    assert torch.equal(drawn, law.sample_timesteps(500, torch.Generator().manual_seed(3)))


def test_the_prediction_type_chooses_the_law():
    assert isinstance(from_config({}), Epsilon)
    assert isinstance(from_config({"prediction_type": "v_prediction"}), Velocity)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"prediction_type": "sample"}, "'sample'"), ({"beta_schedule": "wavy"}, "'wavy'")],
)
def test_what_is_not_known_is_refused_by_name(config, named):
    with pytest.raises(LiveryError, match=rf"folder/scheduler: .*{named}"):
        from_config(config, where="folder/scheduler")
