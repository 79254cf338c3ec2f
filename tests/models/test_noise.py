"""The noise law against formulas written out by hand, and against diffusers' own DDPMScheduler."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from livery.models.noise import Diffusion, Epsilon, Flow, Velocity, for_recipe, from_config
from livery.nouns import LiveryError, LossSpec, NoiseSpec, Recipe

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


def diffusion(config: dict[str, Any]) -> Diffusion:
    law = from_config(config)
    assert isinstance(law, Diffusion)
    return law


def rows(count: int = 5, shape: tuple[int, ...] = (3, 4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, *shape, generator=generator)


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_mix_and_target_are_those_of_diffusers(config, prediction):
    config = {**config, "prediction_type": prediction}
    law, theirs = cast(Any, diffusion(config)), cast(Any, DDPMScheduler(**config))
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
def test_min_snr_weights_are_those_of_diffusers_trainers(prediction, gamma):
    """The lines are of diffusers' examples/text_to_image/train_text_to_image.py."""
    config = {**SD15, "prediction_type": prediction}
    t = torch.tensor([0, 100, 500, 999])
    snr = compute_snr(DDPMScheduler(**config), t)
    wanted = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    wanted = wanted / (snr if prediction == "epsilon" else snr + 1)
    weights = from_config(config).weight(t, LossSpec(min_snr_gamma=gamma))
    assert torch.allclose(weights, wanted, rtol=1e-3)


def test_debiased_weights_of_the_noise_are_the_papers():
    """1 / sqrt(snr): Yu et al. 2023; the ratio is at most 1000, as in kohya's trainer."""
    t = torch.tensor([0, 1, 100, 500, 999])
    snr = compute_snr(DDPMScheduler(**SD15), t).tolist()
    wanted = [1 / min(ratio, 1000) ** 0.5 for ratio in snr]
    weights = from_config(SD15).weight(t, LossSpec(weighting="debiased"))
    assert weights.tolist() == pytest.approx(wanted, rel=1e-3)
    assert weights[0] == pytest.approx(1000**-0.5)


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
def test_a_weighted_error_is_the_same_in_either_prediction(weighting):
    """What one wrong picture costs does not hang on whether the network answers the noise or v."""
    noises, velocities = diffusion(SD15), diffusion({**SD15, "prediction_type": "v_prediction"})
    clean, noise = rows(4)
    wrong, _ = rows(8)
    t = torch.tensor([5, 100, 500, 999])
    costs = []
    for law in cast(Any, (noises, velocities)):
        noisy = law.mix(clean, noise, t)
        level = law.alpha_bar[t][:, None, None, None]
        claimed_noise = (noisy - level.sqrt() * wrong[:4]) / (
            1 - level
        ).sqrt()  # the noise if `wrong` was clean
        error = law.target(wrong[:4], claimed_noise, t) - law.target(clean, noise, t)
        costs.append(law.weight(t, LossSpec(weighting=weighting)) * error.square().flatten(1).mean(1))
    assert torch.allclose(*costs, rtol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_without_weighting_all_rows_count_alike(prediction):
    law = from_config({**SD15, "prediction_type": prediction})
    assert law.weight(torch.tensor([0, 999]), LossSpec(weighting="none")).tolist() == [1, 1]


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
def test_pure_noise_has_finite_weights_and_no_signal(weighting):
    config, loss = {**SD15, "rescale_betas_zero_snr": True}, LossSpec(weighting=weighting)
    last = torch.tensor([999])
    assert bool(from_config(config).weight(last, loss).isfinite())
    velocity = from_config({**config, "prediction_type": "v_prediction"})
    assert float(velocity.weight(last, loss)) == 0
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


# ------------------------------------------------------------------------------ rectified flow


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_mixes_as_diffusers_does(shift):
    theirs = cast(Any, FlowMatchEulerDiscreteScheduler(shift=shift))
    law = from_config(theirs.config)
    clean, noise = rows()
    t = theirs.timesteps[[0, 10, 500, 900, 999]]
    mixed = law.mix(clean, noise, t / 1000)
    assert torch.allclose(mixed, theirs.scale_noise(clean, t, noise), atol=1e-6)
    assert law == Flow(shift=shift)


def test_a_flow_is_known_by_its_class_or_by_its_keys():
    assert from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}) == Flow(shift=2.0)
    with pytest.raises(LiveryError, match="use_dynamic_shifting"):
        from_config({**FlowMatchEulerDiscreteScheduler().config, "use_dynamic_shifting": True})


def test_one_step_of_diffusers_sampler_with_the_target_ends_in_the_picture():
    theirs = cast(Any, FlowMatchEulerDiscreteScheduler(shift=3.0))
    law = from_config(theirs.config)
    clean, noise = rows(2)
    theirs.set_timesteps(1)
    t = theirs.timesteps / 1000
    drawn = theirs.step(law.target(clean, noise, t), theirs.timesteps[0], noise, return_dict=False)[0]
    assert torch.allclose(drawn, clean, atol=1e-5)
    some = torch.tensor([0.2, 0.9])
    noisy, target = law.mix(clean, noise, some), law.target(clean, noise, some)
    assert torch.allclose(law.clean(noisy, target, some), clean, atol=1e-5)


def test_the_levels_of_a_flow_are_the_shifted_logit_normal_ones():
    law = for_recipe(Flow(), Recipe(noise=NoiseSpec(shift=3.0, logit_mean=0.5, logit_std=0.7)))
    drawn = law.sample_timesteps(50, torch.Generator().manual_seed(3))
    u = compute_density_for_timestep_sampling(
        "logit_normal", 50, logit_mean=0.5, logit_std=0.7, generator=torch.Generator().manual_seed(3)
    )
    assert torch.allclose(drawn, 3 * u / (1 + 2 * u), atol=1e-6)
    assert torch.equal(law.weight(drawn, LossSpec()), compute_loss_weighting_for_sd3("none", drawn))


def test_the_shift_of_the_base_holds_unless_the_recipe_has_one():
    assert for_recipe(Flow(shift=3.0), Recipe()) == Flow(shift=3.0)
    uniform = for_recipe(Flow(shift=1.0), Recipe(noise=NoiseSpec(timesteps="uniform")))
    drawn = uniform.sample_timesteps(4000, torch.Generator().manual_seed(0))
    shares = np.histogram(drawn.numpy(), bins=4, range=(0, 1))[0] / 4000
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


# ------------------------------------------------------------------------------ what a recipe asks for


@pytest.mark.parametrize("law", [from_config(SD15), Flow(shift=3.0)])
def test_levels_spread_evenly_and_rise(law):
    levels = law.levels(8)
    assert len(set(levels.tolist())) == 8
    steps = levels.double().diff()
    assert torch.allclose(steps, steps[0].expand(7))
    spread = law.mix(torch.zeros(8, 1, 1, 1), torch.ones(8, 1, 1, 1), levels).flatten()
    assert bool((spread.diff() > 0).all())


def test_logit_normal_levels_of_diffusion_crowd_in_the_middle():
    law = for_recipe(from_config(SD15), Recipe(noise=NoiseSpec(timesteps="logit-normal")))
    drawn = law.sample_timesteps(4000, torch.Generator().manual_seed(0))
    inside = torch.distributions.Normal(0, 1).cdf(torch.logit(torch.tensor([0.25, 0.75])))
    assert ((drawn >= 250) & (drawn < 750)).float().mean().item() == pytest.approx(
        float(inside[1] - inside[0]), abs=0.03
    )
    assert drawn.dtype == torch.int64


def test_zero_terminal_snr_is_that_of_diffusers():
    config = {**SD15, "prediction_type": "v_prediction"}
    law = for_recipe(from_config(config), Recipe(loss=LossSpec(zero_terminal_snr=True)))
    theirs = DDPMScheduler(**config, rescale_betas_zero_snr=True)
    assert isinstance(law, Diffusion)
    assert torch.allclose(law.alpha_bar[:-1], theirs.alphas_cumprod[:-1], atol=1e-5)
    assert float(law.alpha_bar[-1]) == 0


@pytest.mark.parametrize(
    ("law", "recipe", "named"),
    [
        (Flow(), Recipe(loss=LossSpec(weighting="debiased")), "'debiased'"),
        (Flow(), Recipe(loss=LossSpec(zero_terminal_snr=True)), "zero_terminal_snr"),
        (from_config(SD15), Recipe(noise=NoiseSpec(shift=3.0)), "noise.shift"),
        (from_config(SD15), Recipe(loss=LossSpec(zero_terminal_snr=True)), "v-prediction"),
    ],
)
def test_what_a_law_does_not_have_is_refused_by_key(law, recipe, named):
    with pytest.raises(LiveryError, match=named):
        for_recipe(law, recipe)
