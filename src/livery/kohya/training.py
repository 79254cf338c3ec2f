"""How a kohya configuration runs: base, steps, optimiser, class photos, memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from livery.kohya.settings import Settings, as_number
from livery.kohya.tables import BASES, NOT_THE_SAME, OPTIMIZERS, REASONS, SCHEDULES, USUAL
from livery.nouns import LiveryError


def base_and_family(settings: Settings, family: str | None) -> dict[str, Any]:
    """Raises LiveryError for a model that livery does not train."""
    path, module = settings.text("pretrained_model_name_or_path"), settings.text("network_module")
    hints = f"{path} {module}".casefold()
    if "flux" in hints or "lumina" in hints or settings.on("flux1_checkbox"):
        raise LiveryError(f"{settings.path}: this is not a Stable Diffusion: livery trains sd1, sdxl and sd3")
    if family is None and (settings.on("sdxl") or "xl" in hints):
        family = "sdxl"
    elif family is None and (settings.on("sd3_checkbox") or re.search(r"sd-?3|diffusion-3|lora_sd3", hints)):
        family = "sd3"
    elif family is None:
        family = "sd1"
    if family not in BASES:
        raise LiveryError(f"family '{family}' is none of {', '.join(BASES)}")
    for key in ("sdxl", "sd3_checkbox", "v2"):
        if settings.on(key):
            settings.taken(key, f'family = "{family}"')
    if path:
        settings.taken("pretrained_model_name_or_path", "base")
    else:
        settings.changed(
            "pretrained_model_name_or_path", f"base = {BASES[family]}", "none is named: the usual one"
        )
    if settings.on("v_parameterization"):
        settings.taken("v_parameterization", "", "livery reads it from the base's scheduler")
    return {"base": path or BASES[family], "family": family}


def run(settings: Settings) -> dict[str, Any]:
    """Batches, steps, precision, seed, and what happens on the way."""
    batch = settings.whole("train_batch_size", 1) or 1
    values: dict[str, Any] = {"batch_size": batch, "precision": _precision(settings)}
    settings.taken(
        "train_batch_size", f"batch_size = {batch}", "" if settings.has("train_batch_size") else "default"
    )
    accumulate = settings.whole("gradient_accumulation_steps", 1) or 1
    if settings.has("gradient_accumulation_steps"):
        values["accumulate"] = accumulate
        settings.taken("gradient_accumulation_steps", f"accumulate = {accumulate}")
    values |= _steps(settings, batch * accumulate)
    if settings.has("seed"):
        values["seed"] = settings.whole("seed")
        settings.taken("seed", f"seed = {values['seed']}", "the random numbers themselves are others")
    for key, ours in (
        ("save_every_n_steps", "checkpoint_every"),
        ("validate_every_n_steps", "validate_every"),
    ):
        if settings.has(key):
            values[ours] = settings.whole(key)
            settings.taken(key, f"{ours} = {values[ours]}")
    return values | _samples(settings)


def _precision(settings: Settings) -> str:
    found = settings.text("mixed_precision", "no")
    precision = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(found, "fp32")
    settings.taken("mixed_precision", f'precision = "{precision}"')
    return precision


def _steps(settings: Settings, rows: int) -> dict[str, Any]:
    """kohya's steps: given, or epochs over the pictures times their repeats."""
    if settings.has("max_train_epochs"):
        epochs, repeats = settings.number("max_train_epochs"), _repeats(settings)
        per_photo = epochs * (repeats or 1) / rows
        why = f"{epochs:g} epochs x {repeats or 1} repeats / {rows} rows a step"
        say = settings.taken if repeats else settings.changed
        if not repeats:
            why += "; repeats stand in the names of your folders: multiply by them"
        say("max_train_epochs", f"steps_per_photo = {per_photo:g}", why)
        if settings.has("max_train_steps"):
            settings.dropped("max_train_steps", "epochs win, as in kohya")
        return {"steps_per_photo": per_photo, "min_steps": 1, "max_steps": 10_000_000}
    steps = settings.whole("max_train_steps", 1600) or 1600
    note = "" if settings.has("max_train_steps") else "kohya's default"
    settings.taken("max_train_steps", f"steps = {steps}", note)
    return {"steps": steps}


def _repeats(settings: Settings) -> float | None:
    """From num_repeats, or from the folders (10_name) where they are at hand; none when nobody says."""
    if settings.has("num_repeats"):
        settings.taken("num_repeats", "steps_per_photo")
        return settings.number("num_repeats")
    folder = Path(settings.text("train_data_dir"))
    if not settings.has("train_data_dir") or not folder.is_dir():
        return None
    found = [re.match(r"(\d+)_", each.name) for each in sorted(folder.iterdir()) if each.is_dir()]
    counts = {int(match.group(1)) for match in found if match}
    return float(counts.pop()) if len(counts) == 1 else None


def _samples(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if settings.has("sample_every_n_steps"):
        values["sample_every"] = settings.whole("sample_every_n_steps")
        settings.taken("sample_every_n_steps", f"sample_every = {values['sample_every']}")
    if settings.has("sample_prompts"):
        named = settings.text("sample_prompts")
        beside = settings.path.parent / named if len(named) < 255 and "\n" not in named else None
        lines = beside.read_text("utf-8") if beside and beside.is_file() else named if "\n" in named else ""
        prompts = [re.split(r"\s--\w", line)[0].strip() for line in lines.splitlines()]
        prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
        if prompts:
            values["sample_prompts"] = prompts
            settings.changed("sample_prompts", f"{len(prompts)} sample_prompts", "without their --options")
        else:
            settings.dropped(
                "sample_prompts", "the file of prompts is not beside this one, or is no text file"
            )
    return values


def optimizer(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    name = settings.text("optimizer_type", "AdamW")
    known = OPTIMIZERS.get(name.rsplit(".", 1)[-1].casefold())
    if settings.on("use_8bit_adam"):
        known = OPTIMIZERS["adamw8bit"]
    kind, decay, difference = known or ("adamw", 0.01, "livery has no such optimiser")
    (settings.changed if difference else settings.taken)(
        "optimizer_type", f'optimizer.kind = "{kind}"', difference
    )
    found: dict[str, Any] = {"kind": kind, "weight_decay": decay}
    for key, value in settings.optimizer_args.items():
        _optimizer_argument(settings, found, key, value)
    norm = settings.number("max_grad_norm", 1.0)
    found["clip_norm"] = norm or 1e6
    if settings.has("max_grad_norm") or not norm:
        settings.taken("max_grad_norm", f"optimizer.clip_norm = {found['clip_norm']:g}")
    return found | _schedule(settings, values)


def _optimizer_argument(settings: Settings, found: dict[str, Any], key: str, value: str) -> None:
    name, kind = f"optimizer_args.{key}", found["kind"]
    if key == "weight_decay":
        found["weight_decay"] = as_number(value, name, settings.path)
        settings.taken(name, f"optimizer.weight_decay = {found['weight_decay']:g}")
    elif key == "betas" and kind != "adafactor":
        betas = [as_number(each, name, settings.path) for each in re.findall(r"[\d.eE-]+", value)]
        found["betas"] = betas[:2]
        settings.taken(name, f"optimizer.betas = {betas[:2]}")
    elif kind == "adafactor" and key == "relative_step" and value.casefold() == "true":
        settings.changed(name, "optimizer.kind", "livery gives Adafactor the learning rate as written")
    elif kind == "prodigy" and key in ("use_bias_correction", "safeguard_warmup", "decouple"):
        (settings.taken if value.casefold() == "true" else settings.changed)(
            name, "optimizer.kind", "always on here"
        )
    else:
        settings.dropped(name, "livery leaves it at the optimiser's default")


def _schedule(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    name = settings.text("lr_scheduler", "constant")
    if settings.has("lr_scheduler_type"):
        name = "cosine" if "cosine" in settings.text("lr_scheduler_type").casefold() else name
        settings.changed(
            "lr_scheduler_type", f'optimizer.schedule = "{name}"', "the nearest of livery's schedules"
        )
    schedule, difference = SCHEDULES.get(name, ("constant", "livery has no such schedule"))
    ours = f'optimizer.schedule = "{schedule}"'
    (settings.changed if difference else settings.taken)("lr_scheduler", ours, difference)
    found: dict[str, Any] = {"schedule": schedule, "warmup_steps": 0}
    if schedule == "cosine-restarts":
        found["restarts"] = settings.whole("lr_scheduler_num_cycles", 1) or 1
        settings.taken("lr_scheduler_num_cycles", f"optimizer.restarts = {found['restarts']}")
    warmup, key = settings.number("lr_warmup_steps"), "lr_warmup_steps"
    if not warmup and settings.has("lr_warmup"):
        warmup, key = settings.number("lr_warmup") / 100, "lr_warmup"
    if not warmup:
        return found
    if name == "constant":
        settings.dropped(key, "kohya's 'constant' does not warm up either")
    elif warmup >= 1:
        found["warmup_steps"] = round(warmup)
        settings.taken(key, f"optimizer.warmup_steps = {found['warmup_steps']}")
    elif "steps" in values:
        found["warmup_steps"] = round(warmup * values["steps"])
        settings.taken(key, f"optimizer.warmup_steps = {found['warmup_steps']}", f"{warmup:g} of the steps")
    else:
        settings.dropped(key, f"{warmup:g} of steps that hang on the pictures: set optimizer.warmup_steps")
    return found


def prior(settings: Settings) -> dict[str, Any]:
    """Regularisation pictures become class photos, if the class is named."""
    if not settings.has("reg_data_dir"):
        return {}
    prompt = settings.text("class_tokens_of_reg") or _class_of(Path(settings.text("reg_data_dir")))
    if not prompt:
        why = 'name its class in the recipe: [prior] kind = "photos", prompt = "a dog"'
        settings.dropped("reg_data_dir", why)
        return {}
    weight = settings.number("prior_loss_weight", 1.0) or 1.0
    settings.changed(
        "reg_data_dir", f'prior.kind = photos, prompt = "{prompt}"', "missing class photos are drawn"
    )
    settings.taken("prior_loss_weight", f"prior.weight = {weight:g}")
    return {"prior": {"kind": "photos", "prompt": prompt, "weight": weight}}


def _class_of(folder: Path) -> str:
    """The class that kohya reads from a folder's name: "1_dog" -> "dog"."""
    names = [folder.name, *(each.name for each in folder.iterdir())] if folder.is_dir() else [folder.name]
    found = [match.group(1) for name in names if (match := re.match(r"\d+_(.+)", name))]
    return found[0] if found else ""


def memory(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """Only where the file trades something; else livery's 'auto' chooses."""
    full, dora = any(each["kind"] == "full" for each in values["tuners"]), values["tuners"][0].get("dora")
    found: dict[str, Any] = {}
    if settings.on("gradient_checkpointing"):
        found["checkpointing"] = True
        settings.taken("gradient_checkpointing", "memory.checkpointing = true")
    if settings.on("fused_backward_pass") and full and values.get("accumulate", 1) == 1:
        found["fused_backward"] = True
        settings.taken("fused_backward_pass", "memory.fused_backward = true")
    for key in ("full_bf16", "full_fp16"):
        if settings.on(key) and full:
            settings.dropped(key, "what trains stays in fp32: small steps would be lost in rounding")
        elif settings.on(key):
            found["weights"] = "bf16"
            say = settings.taken if key == "full_bf16" else settings.changed
            say(key, 'memory.weights = "bf16"', "of the base; the adapter stays in fp32")
    for key in ("fp8_base", "fp8_base_unet"):
        if settings.on(key) and (full or dora):
            settings.dropped(key, "kinds 'full' and dora need the weights whole")
        elif settings.on(key):
            found["weights"] = "int8"
            settings.changed(key, 'memory.weights = "int8"', "livery's 8-bit form")
    if not found:
        return {}
    low = {"bf16": "bf16", "fp16": "fp16"}.get(str(values["precision"]), "fp32")
    return {"mode": "manual", "weights": "fp32" if full else low, **found}


def say_what_is_left(settings: Settings) -> int:
    """Every key that nothing was said of is dropped by name, those that are off are counted."""
    idle = 0
    for key in settings.unsaid():
        if not settings.has(key) or settings.text(key).removesuffix(".0") == USUAL.get(key):
            idle += 1
        else:
            settings.dropped(key, NOT_THE_SAME.get(key) or REASONS.get(key) or "livery has nothing like it")
    return idle
