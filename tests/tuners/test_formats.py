"""Every family x tuner x format: written, read back, the same change; and what other tools' files say."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from livery import plugins
from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, Checked, LiveryError, LowRankSpec, Reduced, Written
from livery.tuners import export as exporting
from livery.tuners.adapter_file import attach_state
from livery.tuners.export import Style, export_adapter
from livery.tuners.importing import import_adapter

Learn = Callable[..., dict[str, Tensor]]
Cards = Callable[..., AdapterCard]
FAMILIES = list(plugins.families())
TUNERS: dict[str, LowRankSpec] = {
    "lora": LowRankSpec(rank=3, alpha=5),
    "lora, rslora": LowRankSpec(rank=4, alpha=3, rslora=True),
    "lora, ranks": LowRankSpec(rank=4, ranks={r".*to_q": 2}, alphas={r".*to_v": 1.5}),
    "lora, convolutions": LowRankSpec(rank=2, alpha=3, targets=r".*(conv1|conv2|conv|proj|proj_in|to_k)"),
    "dora": LowRankSpec(rank=3, alpha=2, dora=True),
    "loha": LowRankSpec(kind="loha", rank=3, alpha=2),
    "lokr": LowRankSpec(kind="lokr", rank=2, alpha=3),
    "oft": LowRankSpec(kind="oft", rank=4),
}
RANKED = 2
"""The rank given where a format has no form for a kind."""


@cache
def tiny(family: str) -> Backbone:
    return plugins.families()[family].tiny()


def with_towers(spec: LowRankSpec, base: Backbone) -> LowRankSpec:
    return spec.model_copy(update={"towers": dict.fromkeys(base.towers, 1e-4)})


def needs_rank(spec: LowRankSpec, form: str, family: str) -> bool:
    if form == "diffusers":
        return spec.kind != "lora"
    return spec.kind == "oft" or (spec.kind == "lokr" and family == "sd3")


def answer(base: Backbone) -> Tensor:
    side = base.resolution // base.latent.factor
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn((2, base.latent.channels, side, side), generator=generator)
    t = base.noise.sample_timesteps(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.predict(noisy, t, base.encode_prompts(["a fox", ""]))


def answer_with(base: Backbone, card: AdapterCard, state: dict[str, Tensor]) -> Tensor:
    attached = attach_state(base, card, state)
    given = answer(base)
    attached.undo()
    return given


def only(kind: type, events: list[Any]) -> Any:
    found = [event for event in events if isinstance(event, kind)]
    assert len(found) == 1
    return found[0]


ROWS = [
    (family, name, form)
    for family in FAMILIES
    for name in TUNERS
    for form in ("kohya", "diffusers")
    if not (form == "diffusers" and name in ("lora, rslora", "lokr", "oft"))  # as lora and loha there
]


@pytest.mark.parametrize(("family", "name", "form"), ROWS)
def test_a_file_means_the_same_when_it_comes_back(
    family: str, name: str, form: str, card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    base = tiny(family)
    spec = with_towers(TUNERS[name], base) if name in ("lora", "loha") else TUNERS[name]
    state, card = learnt_by(base, spec), card_of(base, spec)
    path = tmp_path / "a.safetensors"
    ranked = needs_rank(spec, form, family)
    if ranked:
        with pytest.raises(LiveryError, match=r"give a\s+rank"):
            list(export_adapter(path, card, state, base, form))
        assert not list(tmp_path.iterdir())
    events = list(export_adapter(path, card, state, base, form, Style(rank=RANKED if ranked else None)))
    assert isinstance(events[-1], Written)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    checked = only(Checked, events)
    with safe_open(path, "pt") as file:
        assert checked.matched == len(list(file.keys())) > 0
    assert checked.unmatched == ()
    assert checked.largest > 1e-3
    exact = 0.0 if "ranks" not in name else 1e-6
    assert checked.difference <= exact
    back, found, content = import_adapter(path, base, base="tiny")
    assert content.unmatched == ()
    if ranked:
        assert 0 < only(Reduced, events).kept < 1
        return
    wanted, plain = answer_with(base, card, state), answer(base)
    assert torch.allclose(answer_with(base, back, found), wanted, atol=1e-5)
    assert not torch.allclose(wanted, plain, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_differs_by_its_rounding_only(
    family: str, dtype: str, card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    base, spec = tiny(family), TUNERS["lora"]
    state, card = learnt_by(base, spec), card_of(base, spec)
    path = tmp_path / "a.safetensors"
    checked = only(Checked, list(export_adapter(path, card, state, base, "kohya", Style(dtype=dtype))))
    step = {"fp16": 2**-11, "bf16": 2**-8}[dtype]
    assert 0 < checked.difference < 4 * step * checked.largest
    tensors = load_file(path)
    assert {str(t.dtype) for name, t in tensors.items() if name.endswith(".alpha")} == {"torch.float32"}
    assert len({t.dtype for name, t in tensors.items() if not name.endswith(".alpha")}) == 1


def test_a_file_that_does_not_mean_the_same_is_not_left(
    card_of: Cards, learnt_by: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What diffusers' own converter does: alpha is the rank, whatever was learnt."""
    base, spec = tiny("sd1"), TUNERS["lora"]
    state, card = learnt_by(base, spec), card_of(base, spec)
    right = exporting.to_kohya
    monkeypatch.setattr(
        exporting,
        "to_kohya",
        lambda *given: {
            name: torch.tensor(3.0) if name.endswith("alpha") else tensor
            for name, tensor in right(*given).items()
        },
    )
    with pytest.raises(LiveryError, match=r"not written, for read back it changes .* otherwise, by"):
        list(export_adapter(tmp_path / "a.safetensors", card, state, base, "kohya"))
    monkeypatch.setattr(
        exporting, "to_kohya", lambda *given: right(*given) | {"lora_unet_x.alpha": torch.ones(())}
    )
    with pytest.raises(LiveryError, match="1 tensors of the file have no place when read back"):
        list(export_adapter(tmp_path / "a.safetensors", card, state, base, "kohya"))
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_when_the_new_one_fails(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny("sd1"), LowRankSpec(rank=2)
    path = tmp_path / "a.safetensors"
    list(export_adapter(path, card_of(base, spec), learnt_by(base, spec), base, "kohya"))
    before = path.read_bytes()
    small = learnt_by(base, spec, size=1e-6)
    tiny_values = {name: 1e-7 * tensor for name, tensor in small.items()}
    with pytest.raises(LiveryError, match="take fp32"):
        list(export_adapter(path, card_of(base, spec), tiny_values, base, "kohya", Style(dtype="fp16")))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
