"""Precision: what is asked for is done, "auto" is decided by the processor, attention agrees either way."""

import pytest
import torch

from livery.models.device import (
    autocast,
    device_name,
    free_memory_bytes,
    peak_memory_bytes,
    resident_bytes,
    resolve,
)
from livery.nouns import LiveryError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "chosen"),
    [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_auto_is_bf16_only_where_the_processor_has_it(
    able: dict[str, bool], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve("auto", CPU) == chosen
    assert resolve("fp32", CPU) == "fp32"
    assert resolve("bf16", CPU) == "bf16"


def test_halves_of_weights_that_learn_are_not_kept():
    """With gradient checkpointing a whole model of them would be: 5 GB for SDXL."""
    from livery.train.dryrun import Holdings

    layers, x = [torch.nn.Linear(256, 256, bias=False) for _ in range(8)], torch.ones(1, 256)
    holdings = Holdings()
    with autocast(CPU, "bf16", 1), holdings:
        for layer in layers:
            x = layer(x).detach()
        assert holdings.held < 2 * 2 * 256 * 256
    assert x.dtype == torch.bfloat16


def test_fp16_is_for_cards_alone():
    assert resolve("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(LiveryError, match=r"precision 'fp16' is for CUDA cards, this is cpu"):
        resolve("fp16", CPU)


def test_free_memory_is_less_than_the_machine_has_and_a_containers_limit_counts(
    monkeypatch: pytest.MonkeyPatch,
):
    import psutil

    free = free_memory_bytes(CPU)
    assert 0 < free <= psutil.virtual_memory().total
    limits = {"/sys/fs/cgroup/memory.max": 1000, "/sys/fs/cgroup/memory.current": 400}
    monkeypatch.setattr("livery.models.device._container", limits.__getitem__)
    assert free_memory_bytes(CPU) == 600


def test_resident_memory_counts_what_is_touched():
    before = resident_bytes()
    block = torch.ones(20_000_000)
    assert resident_bytes() - before > 0.9 * block.nbytes


def test_autocast_computes_products_in_bf16_and_nothing_in_fp32():
    weight = torch.randn(4, 4)
    with autocast(CPU, "bf16", cells=64):
        assert (weight @ weight).dtype == torch.bfloat16
    with autocast(CPU, "fp32", cells=64):
        assert (weight @ weight).dtype == torch.float32
    assert (weight @ weight).dtype == torch.float32


def test_written_out_attention_agrees_with_the_fused_one():
    q, k, v = torch.randn(3, 2, 4, 64, 16).unbind()
    attend = torch.nn.functional.scaled_dot_product_attention
    with autocast(CPU, "bf16", cells=64):
        plain = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.allclose(plain.float(), attend(q, k, v), atol=0.03)


def test_memory_is_counted_in_bytes():
    assert 50e6 < peak_memory_bytes(CPU) < 1e12


def test_the_device_has_a_name():
    assert device_name(CPU).startswith("cpu: ")
