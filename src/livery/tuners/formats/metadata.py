"""Headers that other tools read: kohya's ss_*, A1111's hashes, and modelspec 1.0.1.

Only what the card knows is told. Names of folders and counts of tags are left out unless they are given.
https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, LowRankSpec, TokensSpec
from livery.tuners.delta import Layer
from livery.tuners.formats.diffusers_lora import neat
from livery.tuners.formats.names import MODEL_NAMES, part_names
from livery.tuners.tensor_file import body_of, to_bytes

SGM = "https://github.com/Stability-AI/generative-models"


def headers(
    card: AdapterCard,
    backbone: Backbone,
    layers: Mapping[str, Layer],
    tensors: Mapping[str, Tensor],
    *,
    title: str,
    date: str = "",
    tags: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """All of it for one file. `tags` is counts of caption tags, told only when given; `date` is ISO-8601."""
    training = ss_metadata(card, backbone, layers, title=title, tags=tags) if layers else {}
    told = training | modelspec(card, backbone, tensors, title=title, date=date, lora=bool(layers))
    return told | hashes(tensors, training) | {"format": "pt"}


def ss_metadata(
    card: AdapterCard,
    backbone: Backbone,
    layers: Mapping[str, Layer],
    *,
    title: str,
    tags: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """What kohya's scripts write and A1111 shows; strings only."""
    recipe = card.recipe
    model = model_names(backbone)["kohya"]
    batch = recipe.batch_size * recipe.accumulate
    told: dict[str, Any] = {
        "ss_v2": model.startswith("sd_v2"),
        "ss_base_model_version": model,
        **_network(layers, card.family),
        "ss_output_name": title,
        "ss_sd_model_name": recipe.base,
        "ss_training_comment": f"livery {card.livery_version}" + (f"; {card.origin}" if card.origin else ""),
    }
    if not card.origin:
        told |= {
            "ss_seed": recipe.seed,
            "ss_steps": card.step,
            "ss_max_train_steps": recipe.steps,
            "ss_batch_size_per_device": recipe.batch_size,
            "ss_total_batch_size": batch,
            "ss_gradient_accumulation_steps": recipe.accumulate,
            "ss_learning_rate": recipe.learning_rate,
            "ss_unet_lr": _denoiser_rate(card),
            "ss_text_encoder_lr": json.dumps(_tower_rates(card)) if _tower_rates(card) else "None",
            "ss_lr_scheduler": recipe.optimizer.schedule,
            "ss_lr_warmup_steps": recipe.optimizer.warmup_steps,
            "ss_optimizer": recipe.optimizer.kind,
            "ss_max_grad_norm": recipe.optimizer.clip_norm,
            "ss_mixed_precision": recipe.precision,
            "ss_resolution": _resolution(card, backbone),
            "ss_enable_bucket": recipe.pictures.buckets,
            "ss_caption_dropout_rate": recipe.captions.dropout,
            "ss_caption_tag_dropout_rate": recipe.captions.tag_dropout,
            "ss_shuffle_caption": recipe.captions.shuffle_tags,
            "ss_noise_offset": recipe.noise.offset or None,
            "ss_zero_terminal_snr": recipe.loss.zero_terminal_snr,
            "ss_min_snr_gamma": recipe.loss.min_snr_gamma if recipe.loss.weighting == "min-snr" else None,
            "ss_debiased_estimation": recipe.loss.weighting == "debiased",
            "ss_prior_loss_weight": recipe.prior.weight,
        }
    if tags:
        told["ss_tag_frequency"] = json.dumps({title: dict(tags)}, ensure_ascii=False)
    return {key: str(value) for key, value in told.items()}


def _network(layers: Mapping[str, Layer], family: str) -> dict[str, Any]:
    """The module that reads the file, and the usual rank and alpha."""
    kinds = {layer.kind for layer in layers.values()}
    ranks = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(neat(layer.scale * layer.rank) for layer in layers.values()).most_common(1)[0][0]
    dora = any(layer.is_dora for layer in layers.values())
    if kinds == {"lora"} and not dora:
        module, more = ("networks.lora_sd3" if family == "sd3" else "networks.lora"), {}
    else:
        module, more = "lycoris.kohya", {"algo": "+".join(sorted(kinds)), "dora_wd": str(dora)}
    return {
        "ss_network_module": module,
        "ss_network_dim": ranks or "Dynamic",
        "ss_network_alpha": alpha or ranks,
        "ss_network_args": json.dumps(more),
    }


def _denoiser_rate(card: AdapterCard) -> float:
    own = [s.learning_rate for s in card.recipe.tuners if isinstance(s, LowRankSpec) and s.learning_rate]
    return own[0] if own else card.recipe.learning_rate


def _tower_rates(card: AdapterCard) -> dict[str, float]:
    specs = [spec for spec in card.recipe.tuners if isinstance(spec, LowRankSpec)]
    return {tower: rate for spec in specs for tower, rate in spec.towers.items()}


def _resolution(card: AdapterCard, backbone: Backbone) -> str:
    side = max(card.recipe.pictures.resolutions, default=backbone.resolution)
    return f"({side}, {side})"


def modelspec(
    card: AdapterCard,
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    *,
    title: str,
    date: str = "",
    lora: bool = True,
) -> dict[str, str]:
    """modelspec 1.0.1: what must be there, and what is known of what should and can."""
    side = max(card.recipe.pictures.resolutions, default=backbone.resolution)
    trigger = ", ".join(card.trigger_words or _new_words(card))
    original = not lora or card.family == "sdxl"
    told = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{model_names(backbone)['modelspec']}/{'lora' if lora else 'textual-inversion'}",
        "implementation": SGM if original else "diffusers",
        "implementation_version": f"livery/{card.livery_version}",
        "title": title,
        "resolution": f"{side}x{side}",
        "description": card.origin or f"trained with livery on the base {card.recipe.base}",
        "date": date,
        "hash_sha256": f"0x{hashlib.sha256(body_of(to_bytes(tensors, {}))).hexdigest()}",
        "license": ", ".join(card.licences),
        "trigger_phrase": trigger,
        "prediction_type": {"epsilon": "epsilon", "v": "v"}.get(_prediction(backbone), ""),
    }
    return {f"modelspec.{key}": value for key, value in told.items() if value}


def _new_words(card: AdapterCard) -> tuple[str, ...]:
    return tuple(word for spec in card.recipe.tuners if isinstance(spec, TokensSpec) for word in spec.tokens)


def hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """What A1111 knows a LoRA by: of the file as it would be with the ss_* header alone.

    `sshs_model_hash` is SHA-256 of what lies behind the header; `sshs_legacy_hash` is eight digits of the
    SHA-256 of 64 KiB at 1 MiB.
    """
    content = to_bytes(tensors, training)
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(body_of(content)).hexdigest(), "sshs_legacy_hash": legacy}


def model_names(backbone: Backbone) -> dict[str, str]:
    """What kohya's scripts and modelspec call this base, by the shapes that its versions differ in."""
    names = dict(part_names(MODEL_NAMES, backbone.family))
    config: Mapping[str, Any] = cast(Any, backbone.denoiser).config
    v = _prediction(backbone) == "v"
    if backbone.family == "sd1":
        if config["cross_attention_dim"] == 1024:
            names = {"kohya": "sd_v2", "modelspec": f"stable-diffusion-v2-{'768-v' if v else '512'}"}
        names["kohya"] += "_v" if v else ""
    if backbone.family == "sd3" and config.get("qk_norm"):
        size = "medium" if config.get("dual_attention_layers") else "large"
        names = {"kohya": f"5-{size}", "modelspec": f"stable-diffusion-3-5-{size}"}
    return names


def _prediction(backbone: Backbone) -> str:
    """ "epsilon", "v", or what else the noise law says of itself."""
    said = str(getattr(backbone.noise, "prediction", ""))
    return "v" if said.startswith("v") else said
