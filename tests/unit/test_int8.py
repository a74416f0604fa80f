"""8-bit weights against the definition, and against bitsandbytes' vector-wise quantisation."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from tests.unit.test_nf4 import random_weight
from trainer.model.int8 import Int8

SHAPES = [(64, 128), (5, 131), (300, 64), (1, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """LLM.int8(), section 2: codes are the nearest of 127 shares of a row's largest magnitude; in float64."""
    weight = random_weight(shape, dtype) * torch.logspace(-3, 3, shape[0]).unsqueeze(1).to(dtype)
    largest = weight.double().abs().amax(1, keepdim=True)

    packed, scales = Int8().quantize(weight)

    assert (packed.shape, scales.shape) == (shape, (Int8().num_scale_bytes(*shape),))
    assert packed.dtype == scales.dtype == torch.uint8
    codes, shares = packed.view(torch.int8).double(), 127 * weight.double() / largest
    assert torch.equal(scales.view(torch.float32).double(), largest[:, 0])
    assert (codes - shares).abs().max() <= 0.5 + 1e-4
    assert codes.abs().amax(1).eq(127).all()
    for out in DTYPES:
        error = (Int8().dequantize(packed, scales, out).double() - codes * largest / 127).abs()
        assert (error <= (torch.finfo(out).eps / 2 + 2**-22) * (codes * largest / 127).abs() + 2**-24).all()


def test_loses_at_most_half_a_step() -> None:
    weight = random_weight((512, 1024))
    found = Int8().dequantize(*Int8().quantize(weight), torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all()
    assert (found - weight).norm() < 0.01 * weight.norm()  # NF4 loses some 9%


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_bitsandbytes(dtype: torch.dtype) -> None:
    weight = random_weight((256, 1024), dtype)
    wanted, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.clone())

    packed, scales = Int8().quantize(weight)

    assert torch.equal(scales.view(torch.float32), absmax)
    assert torch.equal(packed.view(torch.int8), wanted)
    theirs = bnb.functional.int8_vectorwise_dequant(packed.view(torch.int8), absmax)
    torch.testing.assert_close(Int8().dequantize(packed, scales, torch.float32), theirs, rtol=1e-6, atol=0)
