"""Precision: what is asked for is done, "auto" is decided by the processor, attention agrees either way."""

import pytest
import torch

from livery.models.device import autocast, device_name, peak_memory_bytes, resolve

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
