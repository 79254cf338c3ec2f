"""How a kohya configuration makes rows of pictures and captions, and what their errors count."""

from __future__ import annotations

import math
import re
from typing import Any

from livery.kohya.settings import Settings, as_number


def pictures(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {"buckets": settings.on("enable_bucket")}
    settings.taken("enable_bucket", f"pictures.buckets = {str(values['buckets']).lower()}")
    side = _resolution(settings, values)
    if values["buckets"]:
        values |= _buckets(settings, side)
    if settings.on("flip_aug"):
        values["flip"] = 0.5
        settings.taken("flip_aug", "pictures.flip = 0.5")
    for key in ("masked_loss", "alpha_mask"):
        if settings.on(key):
            values["masks"] = "loss"
            settings.taken(key, 'pictures.masks = "loss"')
    return values


def _resolution(settings: Settings, values: dict[str, Any]) -> float:
    """The side of the square of equal area, in pixels."""
    sides = [
        as_number(each, "resolution", settings.path)
        for each in re.findall(r"[\d.]+", settings.text("resolution"))
    ]
    if not sides:
        return 512.0
    width, height = sides[0], sides[-1]
    side = math.sqrt(width * height)
    whole = round(side) if width == height else max(64, round(side / 64) * 64)
    values["resolutions"] = [whole]
    if width == height:
        settings.taken("resolution", f"pictures.resolutions = [{whole}]")
    else:
        settings.changed("resolution", f"pictures.resolutions = [{whole}]", "the square of about equal area")
    return side


def _buckets(settings: Settings, side: float) -> dict[str, Any]:
    values: dict[str, Any] = {}
    step = settings.whole("bucket_reso_steps", 64) or 64
    if step % 8 == 0:
        values["bucket_step"] = step
        settings.taken("bucket_reso_steps", f"pictures.bucket_step = {step}")
    else:
        settings.dropped(
            "bucket_reso_steps", "sides must be multiples of what one latent covers: the base's step"
        )
    low = settings.number("min_bucket_reso", 256) or 256
    high = settings.number("max_bucket_reso", 1024) or 1024
    short = max(low, side * side / high)
    values["max_ratio"] = max(1.0, round(side * side / short / short, 3))
    for key in ("min_bucket_reso", "max_bucket_reso"):
        if settings.has(key):
            settings.changed(
                key, f"pictures.max_ratio = {values['max_ratio']:g}", "the longest shape it allows"
            )
    if settings.on("bucket_no_upscale"):
        values["upscale"] = False
        settings.taken("bucket_no_upscale", "pictures.upscale = false")
    return values


def captions(settings: Settings) -> tuple[dict[str, Any], str]:
    """The section, and the trigger that a caption prefix or suffix is."""
    values: dict[str, Any] = {"dropout": settings.number("caption_dropout_rate", 0.0)}
    settings.taken("caption_dropout_rate", f"captions.dropout = {values['dropout']:g}")
    if settings.on("shuffle_caption"):
        values["shuffle_tags"] = True
        settings.taken("shuffle_caption", "captions.shuffle_tags = true")
    if settings.has("caption_tag_dropout_rate"):
        values["tag_dropout"] = settings.number("caption_tag_dropout_rate")
        settings.taken("caption_tag_dropout_rate", f"captions.tag_dropout = {values['tag_dropout']:g}")
    if len(values) > 1:
        values["keep_tags"] = settings.whole("keep_tokens")
        settings.taken("keep_tokens", f"captions.keep_tags = {values['keep_tags']}")
    elif settings.has("keep_tokens"):
        settings.dropped("keep_tokens", "nothing shuffles or drops tags here")
    if settings.has("caption_separator") and settings.text("caption_separator") != ",":
        values["separator"] = str(settings.values["caption_separator"])
        settings.taken("caption_separator", "captions.separator")
    for key, place in (("caption_prefix", "first"), ("caption_suffix", "last")):
        if settings.has(key):
            values["trigger_place"] = place
            trigger = settings.text(key).strip(", ")
            settings.changed(key, f'trigger = "{trigger}"', "put into captions that do not have it yet")
            return values, trigger
    return values, ""


def loss(settings: Settings, family: str) -> dict[str, Any]:
    values: dict[str, Any] = {"weighting": "none"}
    gamma = settings.number("min_snr_gamma")
    if family == "sd3":
        for key in ("min_snr_gamma", "debiased_estimation_loss"):
            if settings.has(key):
                settings.dropped(key, "not defined for rectified flow")
    elif gamma:
        values |= {"weighting": "min-snr", "min_snr_gamma": gamma}
        settings.taken("min_snr_gamma", f"loss.weighting = min-snr, min_snr_gamma = {gamma:g}")
        if settings.on("debiased_estimation_loss"):
            settings.dropped("debiased_estimation_loss", "one loss.weighting at a time: min-SNR is kept")
    elif settings.on("debiased_estimation_loss"):
        values["weighting"] = "debiased"
        settings.taken("debiased_estimation_loss", "loss.weighting = debiased")
    if settings.on("zero_terminal_snr"):
        values["zero_terminal_snr"] = True
        settings.taken("zero_terminal_snr", "loss.zero_terminal_snr = true")
    return values | _kind_of_loss(settings)


def _kind_of_loss(settings: Settings) -> dict[str, Any]:
    kind = settings.text("loss_type", "l2")
    if kind == "l2":
        return {}
    delta = settings.number("huber_c", 0.1) or 0.1
    why = "Huber with one delta for all noise levels; kohya's is smooth and may follow a schedule"
    settings.changed("loss_type", f"loss.kind = huber, huber_delta = {delta:g}", why)
    for key in ("huber_c", "huber_schedule", "huber_scale"):
        if settings.has(key):
            settings.changed(key, f"loss.huber_delta = {delta:g}", why)
    return {"kind": "huber", "huber_delta": delta}


def noise(settings: Settings, family: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    offset, octaves = settings.number("noise_offset"), settings.whole("multires_noise_iterations")
    if offset:
        values["offset"] = offset
        settings.taken("noise_offset", f"noise.offset = {offset:g}")
    discount = settings.number("multires_noise_discount", 0.3)
    if octaves and discount and not offset:
        values["pyramid"] = discount
        settings.taken("multires_noise_discount", f"noise.pyramid = {discount:g}")
        why = "octaves of 2 down to one cell, where kohya draws ratios from 2 to 4"
        settings.changed("multires_noise_iterations", "noise.pyramid", why)
    elif octaves:
        settings.dropped("multires_noise_iterations", "livery takes noise.offset or noise.pyramid, not both")
    if settings.has("ip_noise_gamma"):
        values["input_perturbation"] = settings.number("ip_noise_gamma")
        settings.taken("ip_noise_gamma", f"noise.input_perturbation = {values['input_perturbation']:g}")
    return values | (_flow_levels(settings) if family == "sd3" else {})


def _flow_levels(settings: Settings) -> dict[str, Any]:
    """kohya draws SD3's levels uniformly and without shift unless told otherwise."""
    scheme = settings.text("weighting_scheme", "uniform")
    values: dict[str, Any] = {"timesteps": "uniform", "shift": settings.number("training_shift", 1.0) or 1.0}
    if scheme == "logit_normal":
        values |= {"timesteps": "logit-normal"}
        values |= {
            key: settings.number(key, default) for key, default in (("logit_mean", 0.0), ("logit_std", 1.0))
        }
        for key in ("logit_mean", "logit_std"):
            if settings.has(key):
                settings.taken(key, f"noise.{key}")
    say = settings.taken if scheme in ("logit_normal", "uniform", "none") else settings.changed
    say("weighting_scheme", f'noise.timesteps = "{values["timesteps"]}"', "kohya's default is uniform")
    settings.taken("training_shift", f"noise.shift = {values['shift']:g}")
    return values
