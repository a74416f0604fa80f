"""Layers whose weight is bytes: what they compute, and that nothing touches the bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from torch import nn

from tests.unit.test_nf4 import random_weight
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.model import int8, nf4
from trainer.model.build import build_model
from trainer.model.format import Format
from trainer.model.int8 import Int8
from trainer.model.nf4 import FourBit
from trainer.model.quantized import Fingerprint, QuantizedLinear, QuantizedLinearForDora, fingerprint
from trainer.preflight import result_bytes

NF4 = FourBit("nf4", True)
FORMATS = [*(FourBit(type, double_quant) for type in ("nf4", "fp4") for double_quant in (False, True)), Int8()]


def linear(format: Format = NF4, bias: bool = False, shape: tuple[int, int] = (48, 96)) -> QuantizedLinear:
    layer = QuantizedLinear(shape[1], shape[0], bias, format, torch.float32)
    layer.set_weight(random_weight(shape))
    if layer.bias is not None:
        layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def fingerprint_of_all_kinds() -> str:
    sums, generator = Fingerprint(), torch.Generator().manual_seed(0)
    weight = torch.randint(-(2**20), 2**20, (512, 512), generator=generator) / 2**24
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for format in FORMATS:
            sums.add(*format.quantize(weight.to(dtype)))
    sums.add(nf4.dynamic_map(torch.device("cpu")).view(torch.uint8))
    return sums.text()


def test_bytes_do_not_depend_on_vector_instructions_and_threads() -> None:
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", "import test_quantized; print(test_quantized.fingerprint_of_all_kinds())"]
    found = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint_of_all_kinds()


@pytest.mark.parametrize("chunk", [64, 4096])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bytes_do_not_depend_on_the_chunk(format: Format, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = format.quantize(random_weight((100, 130)))
    for module in (nf4, int8):
        monkeypatch.setattr(module, "CHUNK", chunk)
    assert all(map(torch.equal, whole, format.quantize(random_weight((100, 130)))))


@pytest.mark.parametrize("exponent", [-60, -7, 3, 60])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_do_not_depend_on_the_magnitude(format: Format, exponent: int) -> None:
    weight = random_weight((64, 128))
    (packed, scales), (scaled_packed, scaled_scales) = (format.quantize(w) for w in (weight, weight * 2.0**exponent))
    assert torch.equal(packed, scaled_packed)
    assert torch.equal(
        format.dequantize(packed, scales, torch.float32) * 2.0**exponent,
        format.dequantize(scaled_packed, scaled_scales, torch.float32),
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_stay_zeros(format: Format) -> None:
    weight = random_weight((64, 128))
    weight[3] = weight[5, ::2] = 0
    dequantized = format.dequantize(*format.quantize(weight), torch.float32)
    assert (dequantized[3] == 0).all()
    assert (dequantized[5, ::2] == 0).all()
    assert (dequantized[5, 1::2] != 0).any()
    empty = torch.zeros(4, 64)
    assert torch.equal(format.dequantize(*format.quantize(empty), torch.float32), empty)


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
    layer, other = linear(bias=True), QuantizedLinear(96, 48, True, NF4, torch.float32)

    other.load_state_dict(layer.state_dict())

    assert fingerprint(other) == fingerprint(layer)
    assert torch.equal(other(torch.ones(1, 96)), layer(torch.ones(1, 96)))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_byte_means_what_its_codes_say(format: Format) -> None:
    """Against the definitions, also of bytes that no weight is quantised to."""
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    if isinstance(format, FourBit):
        table, codes = get_4bit_type(format.type, device="cpu"), torch.stack([packed >> 4, packed & 15], dim=-1)
        wanted = table[codes.flatten(1).int()]
    else:
        wanted = packed.view(torch.int8) / 127
    _, scales = format.quantize(torch.ones(wanted.shape))

    torch.testing.assert_close(format.dequantize(packed, scales, torch.float32), wanted)


@pytest.mark.parametrize("name", ["packed", "scales"])
def test_refuses_a_state_dict_of_other_dtypes(name: str) -> None:
    layer = linear()
    before = fingerprint(layer)
    state = {**layer.state_dict(), name: layer.state_dict()[name].float()}

    with pytest.raises(RuntimeError, match=f"{name} is torch.float32"):
        layer.load_state_dict(state)

    assert fingerprint(layer) == before


@pytest.mark.parametrize("make", [lambda: NF4.quantize(torch.ones(4, 7)), lambda: linear(shape=(4, 7))])
def test_odd_inputs_are_refused_by_4_bit(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="even.*\n.*int8"):
        make()
    assert linear(Int8(), shape=(4, 7))(torch.ones(1, 7)).shape == (1, 4)


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
    layer = linear(NF4)
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
    packed, scales = format.quantize(random_weight((48, 96)))
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), scales])[3:]

    assert torch.equal(
        format.dequantize(packed, shifted, torch.float32),
        format.dequantize(packed, scales, torch.float32),
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
    layer, sums = linear(), Fingerprint()
    data = torch.cat([layer.packed.view(-1), layer.scales]).long()
    sums.total, sums.count = torch.stack([data.sum(), data.square().sum()]), len(data)
    assert fingerprint(layer) == sums.text()


def test_weight_is_for_dora_alone() -> None:
    layer = QuantizedLinearForDora(96, 48, False, NF4, torch.float32)
    layer.set_weight(random_weight((48, 96)))

    assert not hasattr(linear(), "weight")
    assert torch.equal(layer.weight, linear().dequantize(torch.float32))
    assert "weight" not in layer.state_dict()


@pytest.mark.parametrize("quantization", [{}, {"double_quant": False}, {"type": "int8"}], ids=str)
def test_disk_of_a_merged_model_does_not_depend_on_the_base_s_bytes(
    quantization: dict[str, Any], toy_recipe: Callable[..., RunConfig]
) -> None:
    sections: dict[str, Any] = {"adapter": {"r": 4}, "export": {"merge": True}}
    plain, quantized = toy_recipe(**sections), toy_recipe(quantization=quantization, **sections)
    wanted = result_bytes(build_model(plain, torch.device("cpu")).model, plain)
    assert result_bytes(build_model(quantized, torch.device("cpu")).model, quantized) == wanted
