"""4-bit weights: bitsandbytes' numbers."""

from __future__ import annotations

from typing import Literal

import bitsandbytes as bnb
import pytest
import torch

from trainer.model import nf4
from trainer.model.nf4 import FourBit

SHAPES = [(64, 128), (8, 96), (5, 130), (300, 64), (3, 2)]  # blocks within rows, across rows, a short last block


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_equals_bitsandbytes_bit_for_bit(
    type: Literal["nf4", "fp4"], shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "CHUNK", 256)  # several chunks
    format, weight = FourBit(type, False), random_weight(shape, dtype)
    wanted, state = bnb.functional.quantize_4bit(weight, quant_type=type, blocksize=64)

    packed, scales = format.quantize(weight)

    assert packed.shape == (shape[0], shape[1] // 2)
    assert packed.dtype == scales.dtype == torch.uint8
    assert torch.equal(packed.view(-1), wanted.view(-1))
    assert torch.equal(scales.view(torch.float32), state.absmax)
    state.shape = torch.Size([weight.numel()])  # as a single row: bitsandbytes' CPU kernel breaks blocks at each row
    for out in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = out
        expected = bnb.functional.dequantize_4bit(wanted, state).view(shape)
        assert torch.equal(format.dequantize(packed, scales, out), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (512, 1024)], ids=str)
@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_double_quantisation_is_close_to_bitsandbytes(type: Literal["nf4", "fp4"], shape: tuple[int, int]) -> None:
    format, weight = FourBit(type, True), random_weight(shape)
    num_blocks = -(-weight.numel() // 64)
    wanted, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type=type, blocksize=64)

    packed, scales = format.quantize(weight)

    floats, codes = scales[:-num_blocks].view(torch.float32), scales[-num_blocks:]
    assert scales.shape == (format.num_scale_bytes(*shape),)
    assert torch.equal(packed.view(-1), wanted.view(-1))
    torch.testing.assert_close(floats[-1], state.offset, rtol=2e-7, atol=0)
    torch.testing.assert_close(floats[:-1], state.state2.absmax, rtol=1e-5, atol=1e-9)
    if num_blocks > 1:  # the single scale is its own mean, and the code of nothing over nothing is anybody's
        assert (codes != state.absmax).float().mean() < 0.01
    state.dtype, state.shape = torch.float32, torch.Size([weight.numel()])
    ours, theirs = (
        format.dequantize(packed, scales, torch.float32),
        bnb.functional.dequantize_4bit(wanted, state),
    )
    assert (ours.view(-1) - theirs).norm() < 1e-3 * theirs.norm()


def test_scales_get_the_nearest_8_bit_code() -> None:
    """Against all 256 values in float64, those on the edge of two aside."""
    weight = random_weight((512, 1024))
    block_scales = FourBit("nf4", False).quantize(weight)[1].view(torch.float32)
    _, scales = FourBit("nf4", True).quantize(weight)
    floats, codes = scales[: -len(block_scales)].view(torch.float32), scales[-len(block_scales) :]
    centred = block_scales.double() - floats[-1].double()
    second = centred.view(-1, 256).abs().amax(1)
    table = nf4.dynamic_map(torch.device("cpu")).double()

    distance = (centred / second.repeat_interleave(256))[:, None].sub(table).abs()

    assert floats[-1] == block_scales.double().mean().float()
    torch.testing.assert_close(floats[:-1].double(), second, rtol=1e-6, atol=0)
    assert (distance.gather(1, codes.long()[:, None])[:, 0] <= distance.amin(1) + 1e-6).all()
    assert codes.unique().numel() > 200


def test_8_bit_type_is_bitsandbytes() -> None:
    """Within a bit: theirs is computed in float32, with last bits that depend on the processor."""
    ours, theirs = nf4.dynamic_map(torch.device("cpu")), bnb.functional.create_dynamic_map()
    torch.testing.assert_close(ours, theirs, rtol=2**-23, atol=0)
    assert (ours.diff() > 0).all()


def test_bfloat16_codes_do_not_depend_on_the_reciprocals_rounding() -> None:
    """CUDA's reciprocal is off by up to one in the last place: no bfloat16 weight and block maximum come that close."""
    bounds, _ = nf4._code_bounds("nf4", torch.device("cpu"))
    mantissas = torch.arange(128, 256).float()
    exact, infinity = 1 / mantissas, torch.tensor(torch.inf)
    for exponent in range(8):  # beyond, all are zero's
        weight = mantissas[:, None] * 2.0**-exponent
        possible = weight <= mantissas
        for sign in (1, -1):
            codes = torch.bucketize(sign * weight * exact, bounds)
            for off in (exact.nextafter(-infinity), exact.nextafter(infinity)):
                assert torch.equal(torch.bucketize(sign * weight * off, bounds)[possible], codes[possible])


def test_equals_params4bit() -> None:
    weight = random_weight((64, 128))
    theirs = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        "cpu"
    )

    packed, _ = FourBit("nf4", True).quantize(weight)

    assert torch.equal(packed.view(-1), theirs.data.view(-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_weights_are_scale_times_code(shape: tuple[int, int]) -> None:
    """Against the definition, with the paper's table (arXiv:2305.14314, appendix E)."""
    weight = random_weight(shape)
    packed, scales = FourBit("nf4", False).quantize(weight)
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1).int()
    blocks = torch.arange(weight.numel()) // 64

    expected = table[codes] * scales.view(torch.float32)[blocks]

    assert torch.equal(FourBit("nf4", False).dequantize(packed, scales, torch.float32).view(-1), expected)
    assert table[8:].diff().min() > 0
    assert (expected - weight.view(-1)).abs().max() <= scales.view(torch.float32).max() * 0.16  # half the widest gap
