"""What a kohya configuration trains, as one of livery's tuners."""

from __future__ import annotations

from typing import Any

from livery.kohya.settings import Settings, as_number

ATTENTION = (
    r".*attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|"
    r"ff\.net\.(0\.proj|2)))"
)
"""What networks.lora adapts in a U-Net: every linear layer and 1 x 1 convolution of its transformers."""
RESNETS = r".*resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.*(down|up)samplers\.\d+\.conv"
"""What conv_dim adds: everything that has weights in the residual blocks."""
OUTER = r"conv_in|conv_out|time_embedding\.linear_[12]"
"""What LyCORIS' preset 'full' adds."""
WIDE = r".*\.(conv1|conv2|(down|up)samplers\.\d+\.conv)|conv_in|conv_out"
"""The 3 x 3 convolutions: these have the rank conv_dim, all others network_dim."""
ALGORITHMS = {
    "lora": "lora",
    "locon": "lora",
    "loha": "loha",
    "lokr": "lokr",
    "diag-oft": "oft",
    "oft": "oft",
}
TOWERS = {
    "sd1": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
WHOLE_LOKR = 10_000
"""Ranks from here on are written by people who want LoKr's second factor whole."""


def tuner(settings: Settings, values: dict[str, Any], *, alpha_as_rank: bool) -> dict[str, Any]:
    """The `[[tuners]]` table. `values` holds the family, and is given the learning rate."""
    if settings.has("token_string"):
        return _tokens(settings, values)
    if settings.has("network_module") or settings.has("network_dim"):
        return _low_rank(settings, values, alpha_as_rank=alpha_as_rank)
    values["learning_rate"] = settings.number("learning_rate", 2e-6)
    settings.taken("learning_rate", f"learning_rate = {values['learning_rate']:g}")
    settings.taken("network_module", 'kind = "full"', "no network is named: the weights themselves train")
    towers = _full_towers(settings, values)
    return {"kind": "full"} | ({"towers": towers} if towers else {})


def _full_towers(settings: Settings, values: dict[str, Any]) -> dict[str, float]:
    rates = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3")
    asked = settings.on("train_text_encoder")  # the GUI leaves it out and goes by the rates
    implied = "train_text_encoder" not in settings.values and any(settings.has(rate) for rate in rates)
    if settings.on("cache_text_encoder_outputs") or not (asked or implied):
        return {}
    if asked:
        settings.taken("train_text_encoder", "towers")
    found: dict[str, float] = {}
    for index, name in enumerate(TOWERS.get(str(values.get("family")), TOWERS["sd1"])):
        key = "learning_rate_te" if not settings.has("learning_rate_te1") else f"learning_rate_te{index + 1}"
        rate = settings.number(key, values["learning_rate"] if asked else 0.0)
        if rate:
            found[name] = rate
        if settings.has(key) and (index == 0 or key != "learning_rate_te"):
            settings.taken(key, f"towers.{name} = {rate:g}")
    return found


def _tokens(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    word = settings.text("token_string")
    values["learning_rate"] = settings.number("learning_rate", 2e-6)
    values.setdefault("trigger", word)
    start, vectors = settings.text("init_word", "style"), settings.whole("num_vectors_per_token", 1)
    settings.taken("learning_rate", f"learning_rate = {values['learning_rate']:g}")
    settings.taken(
        "token_string", f'tokens = {{"{word}" = "{start}"}}, trigger', "your captions get the word"
    )
    if settings.has("init_word"):
        settings.taken("init_word", "tokens")
    if settings.has("num_vectors_per_token"):
        settings.taken("num_vectors_per_token", f"vectors = {vectors}")
    return {"kind": "tokens", "tokens": {word: start}, "vectors": vectors}


def _low_rank(settings: Settings, values: dict[str, Any], *, alpha_as_rank: bool) -> dict[str, Any]:
    kind = _kind(settings)
    if kind == "full":
        values["learning_rate"] = settings.number("unet_lr") or settings.number("learning_rate", 2e-6)
        settings.taken("learning_rate", f"learning_rate = {values['learning_rate']:g}")
        return {"kind": "full"}
    rank = settings.whole("network_dim", 4) or 4
    settings.taken("network_dim", f"rank = {rank}")
    spec: dict[str, Any] = {"kind": kind, "rank": rank}
    alpha = _alpha(settings, kind, rank)
    if kind != "oft" and not alpha_as_rank:
        spec["alpha"] = alpha
    spec |= _targets(settings, values, rank, alpha, alpha_as_rank=alpha_as_rank)
    if kind == "oft":
        spec.pop("alphas", None)
    spec |= _extras(settings, kind)
    scale = 1.0 if kind == "oft" else alpha / rank
    _rates(settings, values, spec, scale, alpha_as_rank=alpha_as_rank)
    return spec


def _kind(settings: Settings) -> str:
    module, algo = settings.text("network_module", "networks.lora"), settings.network_args.get("algo", "")
    name = algo.casefold() or module.rsplit(".", 1)[-1].casefold()
    plain = {"kohya": "lora", "lora_sd3": "lora"}.get(name, name)
    key = "network_args.algo" if algo else "network_module"
    if plain == "full":
        settings.changed(key, 'kind = "full"', "LyCORIS' full is full fine-tuning stored as a difference")
        return "full"
    kind = ALGORITHMS.get(plain, "lora")
    if plain in ALGORITHMS and kind != "oft":
        settings.taken(key, f'kind = "{kind}"')
    else:
        why = (
            "OFT here is peft's: its rank is a size of blocks"
            if kind == "oft"
            else "livery has no such network"
        )
        settings.changed(key, f'kind = "{kind}"', why)
    if algo:
        settings.taken("network_module", f'kind = "{kind}"')
    return kind


def _alpha(settings: Settings, kind: str, rank: int) -> float:
    """kohya's alpha is 1 where none is given, and the rank where it is 0."""
    alpha = settings.number("network_alpha", 1.0) or float(rank)
    if kind == "oft":
        settings.dropped("network_alpha", "OFT turns weights and has no scale")
    elif kind == "lokr" and rank >= WHOLE_LOKR:
        settings.changed(
            "network_alpha", f"alpha = {rank}", "LyCORIS ignores alpha where both factors are whole"
        )
        return float(rank)
    elif not settings.has("network_alpha"):
        settings.taken("network_alpha", f"alpha = {alpha:g}", "kohya's default, where livery's is the rank")
    else:
        settings.taken("network_alpha", f"alpha = {alpha:g}")
    return alpha


def _targets(
    settings: Settings, values: dict[str, Any], rank: int, alpha: float, *, alpha_as_rank: bool
) -> dict[str, Any]:
    """Which layers: kohya's are not livery's default ones."""
    args, lycoris = settings.network_args, settings.text("network_module").startswith("lycoris")
    if str(values.get("family")) == "sd3":
        settings.changed(
            "network_module", "targets", "SD3: livery's default layers, which are not all of kohya's"
        )
        return {}
    conv = int(_argument(settings, "conv_dim", rank if lycoris else 0))
    if not conv:
        return {"targets": ATTENTION}
    conv_alpha = _argument(settings, "conv_alpha", alpha if lycoris else 1.0) or float(conv)
    for key, ours in (
        ("conv_dim", f"ranks of 3 x 3 layers = {conv}"),
        ("conv_alpha", f"alphas = {conv_alpha:g}"),
    ):
        if key in args:
            settings.taken(f"network_args.{key}", ours)
    spec: dict[str, Any] = {"targets": "|".join((ATTENTION, RESNETS, *([OUTER] if lycoris else [])))}
    if conv != rank:
        spec["ranks"] = {WIDE: conv}
    wanted = conv_alpha * (rank / alpha if alpha_as_rank else 1.0)
    if wanted != (conv if alpha_as_rank else alpha) and conv < WHOLE_LOKR:
        spec["alphas"] = {WIDE: wanted}
    return spec


def _extras(settings: Settings, kind: str) -> dict[str, Any]:
    """Dropout, DoRA, LoKr's factor; and what livery has not."""
    args, spec = settings.network_args, dict[str, Any]()
    dropout = "network_dropout" if kind == "lora" else "network_args.rank_dropout"
    amount = settings.number("network_dropout") if kind == "lora" else _argument(settings, "rank_dropout", 0)
    if amount:
        spec["dropout"] = amount
        settings.taken(dropout, f"dropout = {amount:g}")
    if args.get("dora_wd", "").casefold() == "true":
        if kind == "lora":
            spec["dora"] = True
            settings.taken("network_args.dora_wd", "dora = true")
        else:
            settings.dropped("network_args.dora_wd", "livery has DoRA for LoRA alone")
    factor = int(_argument(settings, "factor", -1))
    if factor > 0 and kind == "lokr":
        spec["factor"] = factor
        settings.taken("network_args.factor", f"factor = {factor}")
    said = {row.key for row in settings.table}
    for key, value in args.items():
        if f"network_args.{key}" not in said and value.casefold() not in (
            "",
            "0",
            "0.0",
            "-1",
            "false",
            "none",
        ):
            same = key == "preset" and value == "full"
            if same:
                settings.taken("network_args.preset", "targets")
            else:
                settings.dropped(f"network_args.{key}", "livery has nothing like it")
    return spec


def _rates(
    settings: Settings, values: dict[str, Any], spec: dict[str, Any], scale: float, *, alpha_as_rank: bool
) -> None:
    """Learning rates of the denoiser and the text encoders, with what they are at alpha = rank."""
    finder = values["optimizer"]["kind"] == "prodigy"
    common = settings.number("learning_rate", 2e-6)
    rate = settings.number("unet_lr", common) or common
    factor = scale if alpha_as_rank and not finder else 1.0
    values["learning_rate"] = rate * factor
    why = _rate_words(rate, scale, finder=finder, moved=alpha_as_rank)
    say = settings.changed if factor != 1 else settings.taken
    key = "unet_lr" if settings.has("unet_lr") else "learning_rate"
    say(key, f"learning_rate = {rate * factor:g}", why)
    if key == "unet_lr" and settings.has("learning_rate"):
        settings.dropped("learning_rate", "unet_lr and text_encoder_lr stand for it")
    towers = _tower_rates(settings, str(values.get("family")), common)
    if towers:
        spec["towers"] = {name: own * factor for name, own in towers.items()}
        listed = ", ".join(f"{name} = {own * factor:g}" for name, own in towers.items())
        key = "text_encoder_lr" if settings.has("text_encoder_lr") else "network_train_unet_only"
        note = "" if settings.has("text_encoder_lr") else "off: kohya trains the text encoders too"
        (settings.changed if factor != 1 else settings.taken)(key, f"towers: {listed}", note)
    if settings.on("network_train_text_encoder_only"):
        settings.dropped("network_train_text_encoder_only", "livery always adapts the denoiser too")


def _rate_words(rate: float, scale: float, *, finder: bool, moved: bool) -> str:
    if finder:
        return "Prodigy finds the rate for any alpha / rank"
    if moved:
        return f"x alpha / rank = {scale:.4g}, as alpha became the rank"
    if scale == 1:
        return "alpha = rank, as livery's presets have it"
    return f"alpha / rank = {scale:.4g} is kept; at alpha = rank the rate would be {rate * scale:.4g}"


def _tower_rates(settings: Settings, family: str, common: float) -> dict[str, float]:
    """kohya trains text encoders unless it is told not to, at the common rate unless given one."""
    if settings.on("network_train_unet_only") or settings.on("cache_text_encoder_outputs"):
        key = "network_train_unet_only"
        if settings.on(key):
            settings.taken(key, "no towers")
        return {}
    names = TOWERS.get(family, TOWERS["sd1"])
    if family == "sd3" and settings.network_args.get("train_t5xxl", "").casefold() != "true":
        names = names[:2]
    given = settings.values.get("text_encoder_lr")
    listed = given if isinstance(given, list) else [given] * len(names)
    found: dict[str, float] = {}
    for name, each in zip(names, listed, strict=False):
        rate = common if each in (None, "") else as_number(each, "text_encoder_lr", settings.path)
        if rate:
            found[name] = rate
    if not found and given not in (None, ""):
        settings.taken("text_encoder_lr", "no towers")
    return found


def _argument(settings: Settings, key: str, default: float) -> float:
    value = settings.network_args.get(key, "")
    return as_number(value, f"network_args.{key}", settings.path) if value else float(default)
