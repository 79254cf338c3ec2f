"""What the header tells other tools, and what it keeps to itself."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from livery import plugins
from livery.models.sd1 import SD1
from livery.nouns import AdapterCard, LowRankSpec, TokensSpec, TunerSpec
from livery.tuners.export import Style, export_adapter

Learn = Callable[..., dict[str, Tensor]]
Cards = Callable[..., AdapterCard]
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
MUST = ("sai_model_spec", "architecture", "implementation", "title", "resolution")


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def written(
    spec: TunerSpec,
    card_of: Cards,
    learnt_by: Learn,
    path: Path,
    family: str = "sd1",
    form: str = "kohya",
    **style: object,
) -> dict[str, str]:
    base = plugins.families()[family].tiny()
    list(export_adapter(path, card_of(base, spec), learnt_by(base, spec), base, form, Style(**style)))  # type: ignore[arg-type]
    return header(path)


def test_the_keys_that_tools_need_are_there(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    told = written(LowRankSpec(rank=3, alpha=5), card_of, learnt_by, tmp_path / "acme.safetensors")
    assert all(told[key] for key in MINIMUM)
    assert told["ss_v2"] == "False"
    assert told["ss_base_model_version"] == "sd_v1"
    assert told["ss_network_module"] == "networks.lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("3", "5.0")
    assert json.loads(told["ss_network_args"]) == {}
    assert all(told[f"modelspec.{key}"] for key in MUST)
    assert told["modelspec.sai_model_spec"] == "1.0.1"
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert told["modelspec.title"] == told["ss_output_name"] == "acme"
    assert told["modelspec.trigger_phrase"] == "acme style"
    assert told["modelspec.license"] == "CC0-1.0"
    assert told["modelspec.prediction_type"] == "epsilon"
    assert all(isinstance(value, str) for value in told.values())


def test_versions_have_their_names(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    names = {
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        "sd3": ("medium", "stable-diffusion-3"),
    }
    for family, (kohya, spec) in names.items():
        if family in plugins.families():
            told = written(
                LowRankSpec(rank=2), card_of, learnt_by, tmp_path / f"{family}.safetensors", family
            )
            assert told["ss_base_model_version"].endswith(kohya)
            assert told["modelspec.architecture"].startswith(spec)
            assert ("modelspec.prediction_type" in told) == (family == "sdxl")
    told = written(LowRankSpec(kind="loha", rank=2), card_of, learnt_by, tmp_path / "loha.safetensors")
    assert told["ss_network_module"] == "lycoris.kohya"
    assert json.loads(told["ss_network_args"])["algo"] == "loha"


def test_hashes_are_those_that_others_work_out(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    """With the library's own writer, as kohya's scripts do it: header order cannot matter to the first."""
    path = tmp_path / "a.safetensors"
    told = written(LowRankSpec(rank=2), card_of, learnt_by, path)
    only_ss = {key: value for key, value in told.items() if key.startswith("ss_")}
    plain = safetensors.torch.save(safetensors.torch.load_file(path), only_ss)
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    assert told["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    content = path.read_bytes()
    mine = content[8 + int.from_bytes(content[:8], "little") :]
    assert told["sshs_model_hash"] == hashlib.sha256(mine).hexdigest()
    assert told["modelspec.hash_sha256"] == f"0x{told['sshs_model_hash']}"
    assert len(told["sshs_legacy_hash"]) == 8


def test_tags_are_told_only_when_asked_for(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    private = ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info", "ss_datasets")
    told = written(LowRankSpec(rank=2), card_of, learnt_by, tmp_path / "a.safetensors")
    assert not any(key in told for key in private)
    told = written(LowRankSpec(rank=2), card_of, learnt_by, tmp_path / "a.safetensors", tags={"fox": 3})
    assert json.loads(told["ss_tag_frequency"]) == {"a": {"fox": 3}}


def test_words_are_told_as_textual_inversion(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    spec = TokensSpec(tokens={"<acme>": "shoe"})
    told = written(
        spec, card_of, learnt_by, tmp_path / "acme.safetensors", form="embedding", date="2026-01-02"
    )
    assert told["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert told["modelspec.date"] == "2026-01-02"
    assert not any(key.startswith("ss_") for key in told)


def test_the_same_adapter_is_the_same_file(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    spec, base = LowRankSpec(rank=2), SD1.tiny()
    state, card = learnt_by(base, spec), card_of(base, spec)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        list(export_adapter(tmp_path / name / "x.safetensors", card, state, base, "kohya"))
    assert (tmp_path / "a/x.safetensors").read_bytes() == (tmp_path / "b/x.safetensors").read_bytes()
