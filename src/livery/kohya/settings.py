"""A kohya configuration as one flat table of settings that remembers what became of each key."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from livery.nouns import LiveryError, Noun

Became = Literal["taken", "changed", "dropped"]

GUI_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "epoch": "max_train_epochs",
    "sdxl_checkbox": "sdxl",
    "create_buckets": "enable_bucket",
    "sdxl_no_half_vae": "no_half_vae",
}
"""Keys of kohya_ss' GUI -> the option of sd-scripts that it starts with them."""
GUI_MODULES = {
    "Standard": ("networks.lora", ""),
    "Kohya LoCon": ("networks.lora", ""),
    "Kohya DyLoRA": ("networks.dylora", ""),
    "LoRA-FA": ("networks.lora_fa", ""),
    "LyCORIS/LoCon": ("lycoris.kohya", "locon"),
    "LyCORIS/LoHa": ("lycoris.kohya", "loha"),
    "LyCORIS/LoKr": ("lycoris.kohya", "lokr"),
    "LyCORIS/DyLoRA": ("lycoris.kohya", "dylora"),
    "LyCORIS/iA3": ("lycoris.kohya", "ia3"),
    "LyCORIS/GLoRA": ("lycoris.kohya", "glora"),
    "LyCORIS/Diag-OFT": ("lycoris.kohya", "diag-oft"),
    "LyCORIS/BOFT": ("lycoris.kohya", "boft"),
    "LyCORIS/Native Fine-Tuning": ("lycoris.kohya", "full"),
}
"""`LoRA_type` of the GUI -> module and algorithm."""
GUI_NETWORK_ARGS = ("conv_dim", "conv_alpha", "factor", "decompose_both", "rank_dropout", "module_dropout")
OFF = (None, "", False, 0, 0.0, "0", "0.0", "None", "none", [], "false", "False")


class ImportedKey(Noun):
    """What became of one key."""

    key: str
    value: str
    became: Became
    ours: str = ""
    why: str = ""


class Settings:
    """The file's keys; those that are read leave a line in `table`."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.path, self.values = path, dict(values)
        self.table: list[ImportedKey] = []
        self._said: set[str] = set()
        self.network_args = _pairs(self.values.pop("network_args", None))
        self.optimizer_args = _pairs(self.values.pop("optimizer_args", None))

    def has(self, key: str) -> bool:
        """Whether the key is there and neither empty nor off."""
        return not _is_off(self.values.get(key))

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        return default if value in (None, "") else str(value).strip()

    def number(self, key: str, default: float = 0.0) -> float:
        """Raises LiveryError when it is no number."""
        value = self.values.get(key)
        if value in (None, ""):
            return default
        return as_number(value, key, self.path)

    def whole(self, key: str, default: int = 0) -> int:
        return int(self.number(key, default))

    def on(self, key: str) -> bool:
        return str(self.values.get(key, "")).strip().casefold() in ("true", "1", "yes")

    def taken(self, key: str, ours: str, why: str = "") -> None:
        self._say(key, "taken", ours, why)

    def changed(self, key: str, ours: str, why: str) -> None:
        self._say(key, "changed", ours, why)

    def dropped(self, key: str, why: str) -> None:
        self._say(key, "dropped", "", why)

    def unsaid(self) -> list[str]:
        """Keys that nothing has been said of yet."""
        return [key for key in self.values if key not in self._said]

    def _say(self, key: str, became: Became, ours: str, why: str) -> None:
        self._said.add(key)
        owner, _, name = key.partition(".")
        inside = {"network_args": self.network_args, "optimizer_args": self.optimizer_args}.get(owner)
        value = self.values.get(key, "(not given)") if inside is None else inside.get(name, "(not given)")
        self.table.append(ImportedKey(key=key, value=_shown(value), became=became, ours=ours, why=why))


def as_number(value: Any, key: str, path: Path) -> float:
    """Raises LiveryError when the value is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LiveryError(f"{path}: {key} = {value!r} is not a number: correct it first") from None


def read_settings(path: Path) -> Settings:
    """Read a TOML or JSON configuration. Raises LiveryError when it is neither or no table."""
    try:
        content = path.read_text(encoding="utf-8-sig")
        values: Any = json.loads(content) if path.suffix.lower() == ".json" else tomllib.loads(content)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise LiveryError(f"{path}: cannot be read as a kohya configuration: {error}") from None
    if not isinstance(values, Mapping):
        raise LiveryError(f"{path}: not a kohya configuration: a table of settings is wanted")
    flat = _flat(cast(Mapping[str, Any], values))
    if "LoRA_type" in flat or "max_resolution" in flat or "additional_parameters" in flat:
        flat = _from_gui(flat)
    flat = {**_from_dataset(flat, path), **flat}
    if not {"learning_rate", "network_module", "unet_lr", "optimizer_type", "max_train_steps"} & set(flat):
        raise LiveryError(
            f"{path}: not a kohya configuration: it has neither learning_rate nor network_module; a "
            "dataset's file alone says nothing of the training"
        )
    return Settings(flat, path)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are ignored, as sd-scripts does: only their keys count. Lists of tables are kept."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(cast(Mapping[str, Any], value)) if isinstance(value, Mapping) else {key: value}
    return found


def _from_gui(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the GUI would start sd-scripts with."""
    found = {GUI_NAMES.get(key, key): value for key, value in values.items()}
    cached = ("sdxl_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs")
    found["cache_text_encoder_outputs"] = any(found.pop(key, False) is True for key in cached)
    if not _is_off(values.get("max_train_epochs")):
        found["max_train_epochs"] = values["max_train_epochs"]
    else:  # the GUI lets given steps win over its epochs
        found["max_train_epochs"] = values.get("epoch") if _is_off(values.get("max_train_steps")) else None
    kind = str(found.pop("LoRA_type", "") or "")
    if kind:
        module, algo = GUI_MODULES.get(kind, ("networks.lora", ""))
        found["network_module"] = module
        args = _pairs(found.get("network_args")) | ({"algo": algo} if algo else {})
        if kind == "Kohya LoCon" or algo:
            args |= {key: str(found[key]) for key in GUI_NETWORK_ARGS if not _is_off(found.get(key))}
        found["network_args"] = args
        for key in GUI_NETWORK_ARGS:
            found.pop(key, None)
    if str(found.pop("noise_offset_type", "") or "") == "Multires":
        found.pop("noise_offset", None)
    elif "noise_offset_type" in values:
        found.pop("multires_noise_iterations", None)
    return found | _options(str(found.pop("additional_parameters", "") or ""))


def _options(line: str) -> dict[str, Any]:
    """A command line's options: "--a=1 --b 2 3 --c" -> {"a": "1", "b": ["2", "3"], "c": True}."""
    found: dict[str, Any] = {}
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            found[key] = value if equals else True
        elif key:
            before = found[key]
            found[key] = (
                word if before is True else [*([before] if isinstance(before, str) else before), word]
            )
    return found


def _from_dataset(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a dataset's file (`dataset_config`) says of the training; it yields to the options themselves."""
    tables: Mapping[str, Any] = values
    named = str(values.get("dataset_config") or "")
    if named:
        beside = path.parent / named
        if not beside.is_file():
            return {}
        try:
            tables = tomllib.loads(beside.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise LiveryError(f"{beside}: cannot be read: {error}") from None
    found: dict[str, Any] = dict(cast(Mapping[str, Any], tables.get("general", {}))) if named else {}
    for dataset in _tables(tables.get("datasets")):
        found |= {key: value for key, value in dataset.items() if key != "subsets"}
        for subset in _tables(dataset.get("subsets")):
            if subset.get("is_reg"):
                found["reg_data_dir"] = subset.get("image_dir", True)
                found["class_tokens_of_reg"] = subset.get("class_tokens")
            else:
                found |= {key: value for key, value in subset.items() if key != "image_dir"}
    if "batch_size" in found:
        found["train_batch_size"] = found.pop("batch_size")
    return found


def _tables(value: Any) -> list[Mapping[str, Any]]:
    listed = cast(list[Any], value) if isinstance(value, list) else []
    return [cast(Mapping[str, Any], each) for each in listed if isinstance(each, Mapping)]


def _pairs(value: Any) -> dict[str, str]:
    """["a=1", "b=2"], or the same in one text, as a table."""
    if isinstance(value, Mapping):
        return {str(key): str(inner) for key, inner in cast(Mapping[str, Any], value).items()}
    words = shlex.split(value) if isinstance(value, str) else [str(each) for each in value or ()]
    return {key: inner for key, equals, inner in (word.partition("=") for word in words) if equals}


def _is_off(value: Any) -> bool:
    return value in OFF or (isinstance(value, str) and not value.strip())


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
