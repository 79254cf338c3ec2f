"""The doctor's dry runs: full-size models without weights, and the size of a LoRA on them."""

import pytest
import torch

from livery import doctor
from livery.models.architectures import NAMES
from livery.models.backbone import Backbone
from livery.models.sd1 import SD1
from livery.models.sd3 import SD3
from livery.models.sdxl import SDXL
from livery.nouns import LiveryError, LowRankSpec
from livery.tuners.lowrank import LowRank


@pytest.mark.parametrize("family", [SD1, SDXL, SD3])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_size_of_a_lora_is_that_of_an_attached_one(family: type[Backbone], rank: int):
    backbone = family.tiny()
    layers, number = doctor.lora_size(backbone.denoiser, backbone.lora_targets, rank)
    attached = LowRank.build(LowRankSpec(rank=rank)).attach(backbone)
    assert number == sum(parameter.numel() for parameter in attached.params.values())
    assert layers == len(attached.params) / 2 > 0


def test_convolutions_count_with_their_kernels():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 2), torch.nn.Linear(2, 2))
    assert doctor.lora_size(module, r"[01]", rank=2) == (2, 2 * (4 * 9 + 8) + 2 * (8 + 2))


def test_sdxl_is_told_in_full():
    said = {finding.what: (finding.found, finding.means) for finding in doctor.dry_run("sdxl", rank=16)}
    assert said["sdxl: denoiser"] == ("2,567,463,684 parameters", "4.78 GiB in half precision")
    assert list(said) == [
        "sdxl: denoiser",
        "sdxl: vae",
        "sdxl: text_encoder",
        "sdxl: text_encoder_2",
        "sdxl: LoRA",
    ]
    # 70 blocks of 8 attention and 2 feed-forward projections, by hand from the paper's shapes.
    blocks = {640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 3 * 10 + 10}
    number = sum(
        count * 16 * (6 * 2 * width + 2 * (2048 + width) + (width + 8 * width) + (4 * width + width))
        for width, count in blocks.items()
    )
    found, means = said["sdxl: LoRA"]
    assert found == f"rank 16 on {70 * 10} layers, {number:,} parameters"
    assert means == f"an adapter of {2 * number / 2**20:.1f} MiB in half precision"


def test_a_family_is_all_its_models():
    models = {finding.what.split(":")[0] for finding in doctor.dry_run("sd3")}
    assert models == {"sd3-medium", "sd3.5-medium", "sd3.5-large"}
    assert {finding.what.split(":")[0] for finding in doctor.dry_run("sd2.1")} == {"sd2.1"}
    assert set(NAMES) >= models


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(LiveryError, match="--family: unknown name 'sdlx': did you mean 'sdxl'"):
        list(doctor.dry_run("sdlx"))
