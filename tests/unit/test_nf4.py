"""4-bit weights: bitsandbytes' numbers, in bytes that no cast can touch and every processor makes alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from trainer.errors import UserError
from trainer.model import nf4
from trainer.model.nf4 import Format, NF4Linear, NF4LinearForDora, dequantize_weight, fingerprint, quantize_weight

FORMATS = [Format(type, double_quant) for type in ("nf4", "fp4") for double_quant in (False, True)]
SHAPES = [(64, 128), (8, 96), (5, 130), (300, 64), (3, 2)]  # blocks within rows, across rows, a short last block


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def linear(format: Format = FORMATS[1], bias: bool = False, shape: tuple[int, int] = (48, 96)) -> NF4Linear:
    layer = NF4Linear(shape[1], shape[0], bias, format, torch.float32)
    layer.set_weight(random_weight(shape))
    if layer.bias is not None:
        layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_equals_bitsandbytes_bit_for_bit(
    type: Literal["nf4", "fp4"], shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "CHUNK", 256)  # several chunks
    format, weight = Format(type, False), random_weight(shape, dtype)
    wanted, state = bnb.functional.quantize_4bit(weight, quant_type=type, blocksize=64)

    packed, scales = quantize_weight(weight, format)

    assert packed.shape == (shape[0], shape[1] // 2)
    assert packed.dtype == scales.dtype == torch.uint8
    assert torch.equal(packed.view(-1), wanted.view(-1))
    assert torch.equal(scales.view(torch.float32), state.absmax)
    state.shape = torch.Size([weight.numel()])  # as a single row: bitsandbytes' CPU kernel breaks blocks at each row
    for out in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = out
        expected = bnb.functional.dequantize_4bit(wanted, state).view(shape)
        assert torch.equal(dequantize_weight(packed, scales, format, out), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (512, 1024)], ids=str)
@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_double_quantisation_is_close_to_bitsandbytes(type: Literal["nf4", "fp4"], shape: tuple[int, int]) -> None:
    format, weight = Format(type, True), random_weight(shape)
    num_blocks = -(-weight.numel() // 64)
    wanted, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type=type, blocksize=64)

    packed, scales = quantize_weight(weight, format)

    floats, codes = scales[:-num_blocks].view(torch.float32), scales[-num_blocks:]
    assert scales.shape == (format.num_scale_bytes(weight.numel()),)
    assert torch.equal(packed.view(-1), wanted.view(-1))
    torch.testing.assert_close(floats[-1], state.offset, rtol=2e-7, atol=0)
    torch.testing.assert_close(floats[:-1], state.state2.absmax, rtol=1e-5, atol=1e-9)
    if num_blocks > 1:  # the single scale is its own mean, and the code of nothing over nothing is anybody's
        assert (codes != state.absmax).float().mean() < 0.01
    state.dtype, state.shape = torch.float32, torch.Size([weight.numel()])
    ours, theirs = (
        dequantize_weight(packed, scales, format, torch.float32),
        bnb.functional.dequantize_4bit(wanted, state),
    )
    assert (ours.view(-1) - theirs).norm() < 1e-3 * theirs.norm()


def test_scales_get_the_nearest_8_bit_code() -> None:
    """Against all 256 values in float64, those on the edge of two aside."""
    weight = random_weight((512, 1024))
    block_scales = quantize_weight(weight, Format("nf4", False))[1].view(torch.float32)
    _, scales = quantize_weight(weight, Format("nf4", True))
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


def fingerprint_of_all_kinds() -> str:
    sums, generator = nf4.Fingerprint(), torch.Generator().manual_seed(0)
    weight = torch.randint(-(2**20), 2**20, (512, 512), generator=generator) / 2**24
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for format in FORMATS:
            sums.add(*quantize_weight(weight.to(dtype), format))
    sums.add(nf4.dynamic_map(torch.device("cpu")).view(torch.uint8))
    return sums.text()


def test_bytes_do_not_depend_on_vector_instructions_and_threads() -> None:
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", "import test_nf4; print(test_nf4.fingerprint_of_all_kinds())"]
    found = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint_of_all_kinds()


@pytest.mark.parametrize("chunk", [64, 4096])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bytes_do_not_depend_on_the_chunk(format: Format, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_weight(random_weight((100, 130)), format)
    monkeypatch.setattr(nf4, "CHUNK", chunk)
    assert all(map(torch.equal, whole, quantize_weight(random_weight((100, 130)), format)))


@pytest.mark.parametrize("exponent", [-60, -7, 3, 60])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_do_not_depend_on_the_magnitude(format: Format, exponent: int) -> None:
    weight = random_weight((64, 128))
    (packed, scales), (scaled_packed, scaled_scales) = (
        quantize_weight(w, format) for w in (weight, weight * 2.0**exponent)
    )
    assert torch.equal(packed, scaled_packed)
    assert torch.equal(
        dequantize_weight(packed, scales, format, torch.float32) * 2.0**exponent,
        dequantize_weight(scaled_packed, scaled_scales, format, torch.float32),
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_stay_zeros(format: Format) -> None:
    weight = random_weight((64, 128))
    weight[3] = weight[5, ::2] = 0
    dequantized = dequantize_weight(*quantize_weight(weight, format), format, torch.float32)
    assert (dequantized[3] == 0).all()
    assert (dequantized[5, ::2] == 0).all()
    assert (dequantized[5, 1::2] != 0).any()
    empty = torch.zeros(4, 64)
    assert torch.equal(dequantize_weight(*quantize_weight(empty, format), format, torch.float32), empty)


def test_equals_params4bit() -> None:
    weight = random_weight((64, 128))
    theirs = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        "cpu"
    )

    packed, _ = quantize_weight(weight, Format("nf4", True))

    assert torch.equal(packed.view(-1), theirs.data.view(-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_weights_are_scale_times_code(shape: tuple[int, int]) -> None:
    """Against the definition, with the paper's table (arXiv:2305.14314, appendix E)."""
    weight = random_weight(shape)
    packed, scales = quantize_weight(weight, Format("nf4", False))
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1).int()
    blocks = torch.arange(weight.numel()) // 64

    expected = table[codes] * scales.view(torch.float32)[blocks]

    assert torch.equal(dequantize_weight(packed, scales, Format("nf4", False), torch.float32).view(-1), expected)
    assert table[8:].diff().min() > 0
    assert (expected - weight.view(-1)).abs().max() <= scales.view(torch.float32).max() * 0.16  # half the widest gap


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.float16),
    "type": lambda module: module.type(torch.float32),
    "nested type": lambda module: nn.Sequential(nn.Sequential(module)).type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_no_cast_touches_the_bytes(cast: str, format: Format) -> None:
    layer = linear(format, bias=True)
    before, weight = fingerprint(layer), layer.dequantize(torch.float32)

    CASTS[cast](layer)

    assert layer.packed.dtype == layer.scales.dtype == torch.uint8
    assert fingerprint(layer) == before
    assert torch.equal(layer.dequantize(torch.float32), weight)


def test_moves_between_devices() -> None:
    assert linear().to("meta").packed.is_meta


def test_state_dict_round_trip() -> None:
    layer, other = linear(bias=True), NF4Linear(96, 48, True, FORMATS[1], torch.float32)

    other.load_state_dict(layer.state_dict())

    assert fingerprint(other) == fingerprint(layer)
    assert torch.equal(other(torch.ones(1, 96)), layer(torch.ones(1, 96)))


# Engines that shard floating tensors alone hold the bytes as another dtype's bit view.
VIEWS = [torch.bfloat16, torch.float16, torch.float32]


def as_views(layer: NF4Linear, dtype: torch.dtype) -> NF4Linear:
    for name in ("packed", "scales"):
        view = layer.get_parameter(name).detach().view(dtype)
        layer.register_parameter(name, nn.Parameter(view, requires_grad=False))
    return layer


def every_16_bits() -> torch.Tensor:
    """All patterns, among them each NaN and subnormal of bfloat16 and float16, as ``[256, 512]`` packed bytes."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(256, 256).view(torch.uint8)


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bit_views_dequantise_alike_for_all_patterns(format: Format, view: torch.dtype) -> None:
    _, scales = quantize_weight(random_weight((256, 1024)), format)
    packed = every_16_bits()

    for dtype in (torch.float32, torch.bfloat16):
        wanted = dequantize_weight(packed, scales, format, dtype)
        assert torch.equal(dequantize_weight(packed.view(view), scales.view(view), format, dtype), wanted)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_layers_compute_alike_on_bit_views(view: torch.dtype) -> None:
    x = torch.randn(4, 96, requires_grad=True)
    wanted = linear(bias=True)(x)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)

    output = as_views(linear(bias=True), view)(x)

    assert torch.equal(output, wanted)
    assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], wanted_grad)
    assert fingerprint(as_views(linear(), view)) == fingerprint(linear())


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_no_cast_touches_bit_views(cast: str, view: torch.dtype) -> None:
    layer = NF4Linear(1024, 256, True, FORMATS[1], torch.float32)
    layer.set_weight(random_weight((256, 1024)))
    layer.packed.data.copy_(every_16_bits())
    before = layer.packed.clone()

    CASTS[cast](as_views(layer, view))

    assert layer.packed.dtype == layer.scales.dtype == view
    assert torch.equal(layer.packed.view(torch.uint8), before)
    assert layer.to("meta").packed.is_meta


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_state_dicts_of_bit_views_fit_the_same_views_alone(view: torch.dtype) -> None:
    layer, other = as_views(linear(), view), as_views(linear(shape=(48, 96)), view)
    other.packed.data.zero_()

    other.load_state_dict(layer.state_dict())

    assert fingerprint(other) == fingerprint(linear())
    for given in (torch.float64, torch.uint8):
        state = {name: tensor.to(given) for name, tensor in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=f"packed is {given}"):
            other.load_state_dict(state)
    assert fingerprint(other) == fingerprint(linear())


@pytest.mark.parametrize("name", ["packed", "scales"])
def test_refuses_a_state_dict_of_other_dtypes(name: str) -> None:
    layer = linear()
    before = fingerprint(layer)
    state = {**layer.state_dict(), name: layer.state_dict()[name].float()}

    with pytest.raises(RuntimeError, match=f"{name} is torch.float32"):
        layer.load_state_dict(state)

    assert fingerprint(layer) == before


@pytest.mark.parametrize("make", [lambda: quantize_weight(torch.ones(4, 7), FORMATS[0]), lambda: linear(shape=(4, 7))])
def test_odd_inputs_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="even"):
        make()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_forward_and_gradient_equal_a_dense_layer(format: Format, bias: bool) -> None:
    layer = linear(format, bias)
    x = torch.randn(2, 3, 96, requires_grad=True)
    reference = nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)
    (wanted,) = torch.autograd.grad(reference.square().sum(), x)

    output = layer(x)
    (found,) = torch.autograd.grad(output.square().sum(), x)

    torch.testing.assert_close(output, reference)
    torch.testing.assert_close(found, wanted)


def test_backward_holds_no_dense_weight() -> None:
    layer = linear()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(2, 96, requires_grad=True))

    assert {tensor.data_ptr() for tensor in saved} == {layer.packed.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_under_autocast(inside: bool) -> None:
    layer = linear(Format("nf4", True))
    layer.compute_dtype = torch.bfloat16
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        if inside:
            output.float().sum().backward()
    if not inside:
        output.float().sum().backward()

    assert output.dtype == torch.bfloat16
    wanted = layer.dequantize(torch.float32).sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, wanted, atol=5e-3, rtol=3e-2)


def test_output_keeps_the_input_dtype_without_autocast() -> None:
    layer = linear()
    layer.compute_dtype = torch.bfloat16
    assert layer(torch.ones(1, 96)).dtype == torch.float32


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_scales_may_lie_anywhere_in_memory(format: Format) -> None:
    packed, scales = quantize_weight(random_weight((48, 96)), format)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), scales])[3:]

    assert torch.equal(
        dequantize_weight(packed, shifted, format, torch.float32),
        dequantize_weight(packed, scales, format, torch.float32),
    )


def test_fingerprint_sees_one_bit_and_no_order() -> None:
    layers = [linear(), linear(shape=(16, 64))]
    before = fingerprint(nn.ModuleList(layers))

    assert fingerprint(nn.ModuleList(layers[::-1])) == before
    for data in (layers[0].packed.data, layers[1].scales.data):
        data.view(-1)[-1] ^= 1
        assert fingerprint(nn.ModuleList(layers)) != before
        data.view(-1)[-1] ^= 1
    assert fingerprint(nn.ModuleList(layers)) == before


def test_fingerprint_is_the_sum_over_the_bytes() -> None:
    """Against the definition, so that runs of an earlier version can be resumed and merged."""
    layer, sums = linear(), nf4.Fingerprint()
    data = torch.cat([layer.packed.view(-1), layer.scales]).long()
    sums.total, sums.count = torch.stack([data.sum(), data.square().sum()]), len(data)
    assert fingerprint(layer) == sums.text()


def test_weight_is_for_dora_alone() -> None:
    layer = NF4LinearForDora(96, 48, False, FORMATS[1], torch.float32)
    layer.set_weight(random_weight((48, 96)))

    assert not hasattr(linear(), "weight")
    assert torch.equal(layer.weight, linear().dequantize(torch.float32))
    assert "weight" not in layer.state_dict()
