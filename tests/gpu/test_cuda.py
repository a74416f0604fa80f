"""The model on CUDA: the same kernels' numbers, the same gradients, the same memory bounds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from tests.unit.test_train_float8 import as_float8, check_shares
from trainer.config import RunConfig
from trainer.data.types import IGNORE_INDEX, PackedBatch
from trainer.launchers import World
from trainer.loss import PackedCausalLM
from trainer.model import flash4
from trainer.model.attention import (
    FLASH4,
    VARLEN,
    cached_attention,
    document_attention,
    flash4_attention,
    varlen_attention,
)
from trainer.model.blocks import SwiGLU
from trainer.model.format import Format
from trainer.model.int8 import Int8
from trainer.model.kernels.cross_entropy import cross_entropy_
from trainer.model.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_weight_grad
from trainer.model.kernels.rope import rotate
from trainer.model.kernels.rows import copy_rows, scale_rows
from trainer.model.layers import FusedRMSNorm
from trainer.model.load import load_model
from trainer.model.nf4 import FourBit, _dequantize_scales
from trainer.model.quantized import QuantizedLinear, fingerprint
from trainer.model.recompute import set_recompute, use_float8
from trainer.model.weights import build_on_meta, random_tensor
from trainer.optim import build_optimizer
from trainer.planning.levels import read_levels
from trainer.processes import Processes
from trainer.readings import Figure
from trainer.strategies.single import SingleProcess

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [129, 1, 64, 318]
FORMATS = [FourBit(type, double_quant) for type in ("nf4", "fp4") for double_quant in (False, True)]
QLORA: dict[str, Any] = {"adapter": {"r": 4}, "quantization": {"type": "nf4", "double_quant": True}}
Recipe = Callable[..., RunConfig]


def boundaries() -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=CUDA)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_varlen_attention_equals_documents_in_float64(kv_heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = [8, kv_heads, kv_heads]
    rows = [torch.randn(1, n, sum(LENGTHS), 64, device=CUDA, dtype=dtype, requires_grad=True) for n in heads]
    exact = [x.detach().double().requires_grad_() for x in rows]
    layer, kwargs = nn.Identity(), {"scaling": 0.125, "cu_seq_lens_q": boundaries()}

    output, _ = varlen_attention(layer, *rows, None, max_length_q=max(LENGTHS), **kwargs)
    wanted, _ = document_attention(layer, *exact, None, **kwargs)
    direction = torch.randn_like(wanted)
    output.backward(direction.to(dtype))
    wanted.backward(direction)

    assert relative_error(output, wanted) < 1e-2
    for ours, reference in zip(rows, exact, strict=True):
        assert relative_error(ours.grad, reference.grad) < 1e-2


@pytest.mark.skipif(not flash4.is_installed(), reason="needs flash-attn-4")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (64, 8, 128), (32, 4, 64), (8, 8, 80)])
def test_flash4_equals_documents_or_is_refused(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    fault = flash4.find_fault(heads, kv_heads, head_dim, dtype, CUDA)
    if head_dim != 80:
        assert fault is None
    elif fault:
        assert "wrong for heads of 80" in fault
        return
    torch.manual_seed(1)
    lengths = [1, 700, 33, 128, 1025]
    query, key, value = (torch.randn(1, n, sum(lengths), head_dim, device=CUDA) for n in (heads, kv_heads, kv_heads))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=CUDA)
    grad, results = torch.randn(1, sum(lengths), heads, head_dim, device=CUDA), []
    for attend, to in ((flash4_attention, dtype), (document_attention, torch.float64)):
        rows = [x.to(dtype).to(to).requires_grad_() for x in (query, key, value)]
        output, _ = attend(nn.Identity(), *rows, None, cu_seq_lens_q=ends, max_length_q=max(lengths))
        output.backward(grad.to(dtype).to(to))
        results.append([output, *(row.grad for row in rows)])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted) < (6e-3 if dtype == torch.bfloat16 else 1e-3)


def test_varlen_attention_keeps_documents_apart() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1, 4, sum(LENGTHS), 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]

    def attend() -> list[torch.Tensor]:
        kwargs: dict[str, Any] = {"cu_seq_lens_q": boundaries(), "max_length_q": max(LENGTHS)}
        return list(varlen_attention(nn.Identity(), *rows, None, **kwargs)[0].split(LENGTHS, dim=1))

    before = attend()
    for x in rows:
        x[:, :, sum(LENGTHS[:2]) : sum(LENGTHS[:3])] += 1  # the third document
    for i, (old, new) in enumerate(zip(before, attend(), strict=True)):
        assert torch.equal(old, new) == (i != 2)


# ---------------------------------------------------------------------------------------------------------- quantised


SHAPES = [(512, 1024), (48, 96), (5, 130), (2049, 4160)]  # blocks across rows, a short last block, several chunks
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = random_tensor("w", torch.Size(shape), 0.02, 0, dtype, CPU)
    weight[1], weight[2, ::2] = 0, 0.01  # blocks of zeros, ties
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", [*FORMATS, Int8()], ids=str)
def test_bytes_equal_the_cpus(format: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    on_cpu, on_cuda = (format.quantize(weight.to(device)) for device in (CPU, CUDA))

    assert all(tensor.is_cuda for tensor in on_cuda)
    assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(on_cpu, on_cuda, strict=True))
    for out in DTYPES:
        dequantized, reference = format.dequantize(*on_cuda, out).cpu(), format.dequantize(*on_cpu, out)
        if out == torch.float16 and format != Int8():  # bitsandbytes' kernels round some products otherwise
            assert (dequantized != reference).float().mean() < 1e-3
            torch.testing.assert_close(dequantized, reference, rtol=2**-10, atol=2**-24)
        else:
            assert torch.equal(dequantized, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_4_bit_against_bitsandbytes(format: FourBit, dtype: torch.dtype) -> None:
    """NF4 codes of bfloat16 equal; a neighbouring code where a rounding decides, and FP4's zero of either sign."""
    weight = random_tensor("w", torch.Size([2048, 4096]), 0.02, 0, dtype, CPU).to(CUDA)
    num_blocks = weight.numel() // 64
    wanted, state = bnb.functional.quantize_4bit(
        weight, compress_statistics=format.double_quant, quant_type=format.type, blocksize=64
    )

    packed, scales = format.quantize(weight)

    other = (packed.view(-1) != wanted.view(-1)).float().mean()
    assert other <= (2e-2 if format.type == "fp4" else 0 if dtype == torch.bfloat16 else 1e-5)
    if format.double_quant:
        floats, codes = scales[:-num_blocks].view(torch.float32), scales[-num_blocks:]
        torch.testing.assert_close(floats[-1], state.offset, rtol=1e-6, atol=0)
        torch.testing.assert_close(floats[:-1], state.state2.absmax, rtol=1e-5, atol=0)
        assert (codes != state.absmax).float().mean() < 1e-2
        assert (codes.int() - state.absmax.int()).abs().max() <= 1
    else:
        assert torch.equal(scales.view(torch.float32), state.absmax)
    theirs = bnb.functional.dequantize_4bit(wanted, state)
    assert relative_error(format.dequantize(packed, scales, dtype), theirs) < 2e-2
    if format == FourBit("nf4", False) and dtype == torch.bfloat16:
        assert torch.equal(format.dequantize(packed, scales, dtype), theirs)


def test_a_7b_layer_is_quantised_in_milliseconds() -> None:
    """A 7B model has 32 layers of 202 million weights: some 2 s at 60 ms a layer."""
    weights = [
        torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for shape in [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    ]

    def quantise_layer() -> float:
        start = time.perf_counter()
        for weight in weights:
            FourBit("nf4", True).quantize(weight)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    assert min(quantise_layer() for _ in range(3)) < 0.06


@pytest.mark.parametrize("quantization", [{"double_quant": False}, {"double_quant": True}, {"type": "int8"}], ids=str)
def test_quantised_base_is_the_same_on_both_devices(quantization: dict[str, Any], toy_recipe: Recipe) -> None:
    """So a checkpoint of one resumes on the other, and merges there."""
    sections = {**QLORA, "quantization": quantization}
    on_cpu, on_cuda = (load_model(toy_recipe(**sections), device).base for device in (CPU, CUDA))
    assert on_cpu.nf4_fingerprint is not None
    assert on_cpu == on_cuda


def test_bytes_survive_the_way_to_the_device_and_casts() -> None:
    layer = QuantizedLinear(96, 48, False, FORMATS[1], torch.bfloat16)
    layer.set_weight(torch.randn(48, 96))
    before = fingerprint(layer)
    layer.to(CUDA, torch.bfloat16).half()
    assert layer.packed.is_cuda
    assert fingerprint(layer) == before


# ------------------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_weights_are_the_same_on_both_devices(dtype: torch.dtype) -> None:
    on_cpu, on_cuda = (random_tensor("w", torch.Size([700, 999]), 0.02, 3, dtype, device) for device in (CPU, CUDA))
    assert torch.equal(on_cpu, on_cuda.cpu())


@pytest.mark.parametrize("sections", [{"adapter": {"r": 4}}, QLORA], ids=["lora", "qlora"])
def test_adapter_starts_the_same_on_both_devices(sections: dict[str, Any], toy_recipe: Recipe) -> None:
    models = [load_model(toy_recipe(**sections), device).model for device in (CPU, CUDA)]
    for (name, on_cpu), (_, on_cuda) in zip(*(model.named_parameters() for model in models), strict=True):
        if "lora_" in name:
            assert on_cuda.is_cuda
            assert torch.equal(on_cpu, on_cuda.cpu())


def pack() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (1, sum(LENGTHS)), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, IGNORE_INDEX)
    labels[0, boundaries()[:-1].cpu()] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    trained = torch.nonzero(labels[0] != IGNORE_INDEX).view(-1) - 1
    return PackedBatch(ids, labels, positions, boundaries().cpu(), max(LENGTHS), trained)


def gradient(model: nn.Module, compute_dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    root = PackedCausalLM(model, compute_dtype).train()
    root(pack().to(device)).backward()
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize("recompute", ["none", "norms", "mlp", "full"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_bfloat16_gradients_with_varlen_attention(method: str, dora: bool, recompute: Any, toy_recipe: Recipe) -> None:
    """Against float32 with attention by document, both on the device."""
    if method == "full" and dora:
        pytest.skip("DoRA is an adapter's")
    sections: dict[str, Any] = {} if method == "full" else {"adapter": {"r": 4, "dora": dora}}
    if method == "qlora":
        sections["quantization"] = QLORA["quantization"]
    half = toy_recipe(model={"dtype": "bfloat16"}, **sections)
    model = load_model(half, CUDA).model
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert causal_lm.config._attn_implementation in (FLASH4, VARLEN)
    set_recompute(model, read_levels(recompute, 2))

    found = gradient(model, torch.bfloat16, CUDA)

    assert relative_error(found, gradient(load_model(toy_recipe(**sections), CUDA).model, torch.float32, CUDA)) < 5e-2


@pytest.mark.parametrize("quantization", [None, {"type": "int8"}, {"type": "nf4"}, {"type": "fp4"}], ids=str)
def test_float8_gradients_stay_close(quantization: Any, toy_recipe: Recipe, tmp_path: Path) -> None:
    """Against float32, in layers wide enough for the kernels to lay them out as they do a real model's."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2}
    LlamaConfig(vocab_size=512, num_hidden_layers=2, **sizes).save_pretrained(tmp_path)
    sections = {"adapter": {"r": 16}, "quantization": quantization}
    source = {"path": str(tmp_path), "init": "random"}
    model = load_model(toy_recipe(model=source | {"dtype": "bfloat16"}, **sections), CUDA).model
    use_float8(model, CUDA, "bfloat16")

    found = gradient(model, torch.bfloat16, CUDA)

    exact = load_model(toy_recipe(model=source, **sections), CUDA).model
    assert relative_error(found, gradient(exact, torch.float32, CUDA)) < 0.2


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}}, QLORA], ids=["full", "lora", "qlora"])
def test_a_step_does_not_wait_for_the_gpu(sections: dict[str, Any], toy_recipe: Recipe) -> None:
    config = toy_recipe(model={"dtype": "bfloat16"}, **sections)
    single = SingleProcess(Processes(World(), CUDA))
    single.module = PackedCausalLM(load_model(config, CUDA).model, torch.bfloat16).train()
    single.prepare(partial(build_optimizer, config.optim))
    batch, norms = pack().to(CUDA), []
    for mode in ("default", "error"):  # the first step compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            single.forward_backward([batch, batch], 2 * batch.num_trained_tokens)
            result = single.step(1e-3, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        norms.append(result.grad_norm)
    assert norms[0] > 0 and norms[1] > 0


def test_a_figure_is_read_while_the_gpu_does_what_came_after_it() -> None:
    torch.cuda._sleep(1)  # the first is compiled and loaded
    number = torch.ones((), device=CUDA) * 2
    figure, later = Figure(number), torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)  # cycles, about a second
    later.record()
    assert float(figure) == 2.0 and not later.query() and not figure.is_here


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}}], ids=["full", "lora"])
def test_float32_gradients_equal_the_cpus(sections: dict[str, Any], toy_recipe: Recipe) -> None:
    on_cpu, on_cuda = (gradient(load_model(toy_recipe(**sections), d).model, torch.float32, d) for d in (CPU, CUDA))
    assert relative_error(on_cuda, on_cpu) < 1e-5


def test_generation_with_a_cache(toy_recipe: Recipe) -> None:
    model: Any = load_model(toy_recipe(model={"dtype": "bfloat16"}, **QLORA), CUDA).model.eval()
    ids = torch.randint(5, 300, (2, 8), device=CUDA)
    with cached_attention(model):
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert answer.shape[1] > 8


# ------------------------------------------------------------------------------------------------------------ memory


def anonymous_bytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


@pytest.fixture
def peak_host_bytes() -> Iterator[Callable[[], int]]:
    """Largest RssAnon seen since the test began, beyond what it began with."""
    torch.zeros(1, device=CUDA)
    start, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield lambda: peak - start
    done.set()
    thread.join()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_host_memory_while_loading_6_gib(
    method: str, toy_recipe: Recipe, tmp_path: Path, peak_host_bytes: Callable[[], int]
) -> None:
    config = LlamaConfig(num_hidden_layers=14, architectures=["LlamaForCausalLM"])  # other sizes are Llama-7B's
    config.save_pretrained(tmp_path)
    header, offset, largest = {}, 0, 0
    for name, parameter in build_on_meta(config, torch.bfloat16, "eager").named_parameters():
        end = offset + parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset, largest = end, max(largest, end - offset)
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:  # zeros that take no room
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    assert offset > 5 * 2**30

    sections = QLORA if method == "qlora" else {"adapter": {"r": 4}}
    model = load_model(toy_recipe(model={"path": str(tmp_path), "dtype": "bfloat16"}, **sections), CUDA).model

    assert all(parameter.is_cuda for parameter in model.parameters())
    assert peak_host_bytes() < 2 * largest + 2**30


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1023), (2, 5, 4096)], ids=str)
def test_swiglu_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(shape, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in (gate, up)]
    wanted = nn.functional.silu(exact[0]) * exact[1]
    found = SwiGLU.apply(gate, up)
    direction = torch.randn_like(found)
    found.backward(direction)
    wanted.backward(direction.double())
    bound = torch.finfo(dtype).eps
    assert found.dtype == dtype and relative_error(found, wanted) < bound
    for one, other in ((gate, exact[0]), (up, exact[1])):
        assert one.grad is not None and other.grad is not None
        assert relative_error(one.grad, other.grad) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dequantised_weights_are_those_of_bitsandbytes(format: FourBit, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(75, 704, device=CUDA)
    packed, scales = format.quantize(weight)
    absmax = scales.view(torch.float32) if not format.double_quant else _dequantize_scales(scales, weight.numel() // 64)
    args = (packed, absmax, 64, format.type, [75, 704], dtype)
    wanted = torch.ops.bitsandbytes.dequantize_4bit(*args)
    assert torch.equal(format.dequantize(packed, scales, dtype), wanted)
    for before, width in ((8, 720), (8, 719), (7, 720)):  # weights are stored in pairs where pairs are aligned
        wide = torch.zeros(75, width, device=CUDA, dtype=dtype)
        inner = slice(before, before + 704)
        format.dequantize(packed, scales, dtype, wide[:, inner])
        assert torch.equal(wide[:, inner], wanted)
        assert not wide[:, :before].any() and not wide[:, inner.stop :].any()


@pytest.mark.parametrize(("rank", "first", "columns"), [(16, 0, 16), (5, 5, 15), (4, 0, 12), (8, 16, 24), (0, 0, 8)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_b_lies_beside_dequantised_weights(format: FourBit, rank: int, first: int, columns: int) -> None:
    torch.manual_seed(0)
    packed, scales = format.quantize(torch.randn(75, 704, device=CUDA))
    b = torch.randn(75, rank, device=CUDA, dtype=torch.bfloat16) if rank else None
    found, wanted = (torch.full((75, 704 + columns + 8), 7.0, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    format.dequantize_beside(packed, scales, found[:, :-8], columns, b, first)
    Format.dequantize_beside(format, packed, scales, wanted[:, :-8], columns, b, first)
    assert torch.equal(found, wanted) and (found[:, -8:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (257, 96), (33, 5120), (9, 8192)], ids=str)
def test_norm_kernels_equal_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad, residual = (torch.randn(shape, device=CUDA, dtype=dtype) for _ in range(3))
    weight = torch.randn(shape[1], device=CUDA, dtype=dtype) + 1
    exact, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = nn.functional.rms_norm(exact, shape[1:], exact_weight, 1e-5)
    wanted.backward(grad.double())
    assert exact.grad is not None and exact_weight.grad is not None
    bound = torch.finfo(dtype).eps
    assert relative_error(rms_norm(x, weight, 1e-5), wanted) < bound
    assert relative_error(rms_norm_backward(grad, x, weight, 1e-5, residual), exact.grad + residual) < bound
    assert relative_error(rms_norm_weight_grad(grad, x, weight, 1e-5), exact_weight.grad) < 3 * bound


@pytest.mark.parametrize("columns", [1, 4096, 11008])
def test_rows_are_copied_and_nothing_beside_them(columns: int) -> None:
    x = torch.randn(33, columns + 7, device=CUDA, dtype=torch.bfloat16)[:, 3:-4]
    wide = torch.zeros(33, columns + 16, device=CUDA, dtype=torch.bfloat16)
    copy_rows(x, wide[:, 5 : 5 + columns])
    assert torch.equal(wide[:, 5 : 5 + columns], x)
    assert not wide[:, :5].any() and not wide[:, 5 + columns :].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (75, 704), (4096, 130)], ids=str)
def test_rows_are_scaled_as_on_the_cpu(
    shape: tuple[int, int], dtype: torch.dtype, out: torch.dtype, transposed: bool
) -> None:
    torch.manual_seed(0)
    x, factors = (100 * torch.randn(shape)).to(dtype), torch.randn(shape[0])
    found = []
    for device in (CPU, CUDA):
        wide = torch.zeros(shape[transposed], shape[not transposed] + 16, device=device, dtype=out)
        scale_rows(x.to(device), factors.to(device), wide[:, 8:-8], transposed)
        found.append(wide.cpu())
    assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("beside", [0, 3, 8, 16])  # kernels are compiled anew by how their rows are aligned
@pytest.mark.parametrize("shape", [(75, 704), (2048, 4096), (2049, 4160)], ids=str)
@pytest.mark.parametrize("format", [None, *FORMATS, Int8()], ids=str)
def test_float8_weights_are_shares_of_their_rows_largest(
    format: Format | None, shape: tuple[int, int], beside: int, transposed: bool
) -> None:
    check_shares(*as_float8(format, weight_of(shape).to(CUDA), transposed, beside))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (257, 8, 128), (33, 40, 128), (5, 3, 96)], ids=str)
def test_rotation_equals_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=CUDA, dtype=dtype)
    angles = torch.rand(shape[0], shape[2] // 2, device=CUDA)
    cos, sin = (torch.cat([table, table], dim=1).to(dtype) for table in (angles.cos(), angles.sin()))
    for inverse in (False, True):
        wanted = rotate(x.double().cpu(), cos.double().cpu(), sin.double().cpu(), inverse)
        assert relative_error(rotate(x, cos, sin, inverse).cpu(), wanted) < torch.finfo(dtype).eps
    in_place = x.clone()
    rotate(in_place, cos, sin, out=in_place)
    assert torch.equal(in_place, rotate(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 32000), (1, 2), (7, 8192), (65, 32016), (33, 128256)], ids=str)
def test_cross_entropy_and_its_gradient_equal_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = 8 * torch.randn(shape, device=CUDA, dtype=dtype)
    targets = torch.randint(shape[1], (shape[0],), device=CUDA)
    exact = logits.double().requires_grad_()
    wanted = nn.functional.cross_entropy(exact, targets, reduction="none")
    wanted.sum().backward()
    assert exact.grad is not None
    before = logits.clone()
    torch.testing.assert_close(cross_entropy_(logits, targets, False), wanted.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)
    torch.testing.assert_close(cross_entropy_(logits, targets, True), wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, exact.grad.to(dtype), rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


@pytest.mark.parametrize("at", [0, 5, 8191, 8192, 20000], ids=str)
def test_cross_entropy_tells_of_nan_and_of_targets_that_are_no_column(at: int) -> None:
    """In a row's own loss and gradient, wherever in a block the NaN is, and in no other row's."""
    torch.manual_seed(0)
    logits = torch.randn(6, 20001, device=CUDA, dtype=torch.bfloat16)
    logits[1, at] = float("nan")
    logits[5, :8193], logits[5, at] = float("-inf"), float("nan")
    targets = torch.tensor([0, 1, -100, 20001, 20000, 20000], device=CUDA)
    fine = torch.tensor([True, False, False, False, True, False], device=CUDA)
    wanted = nn.functional.cross_entropy(logits[fine].float(), targets[fine], reduction="none")
    for needs_grad in (False, True):
        losses = cross_entropy_(logits, targets, needs_grad)
        torch.testing.assert_close(losses[fine], wanted, rtol=1e-5, atol=1e-5)
        assert losses[~fine].isnan().all()
    assert logits[fine].isfinite().all() and logits[~fine].isnan().all()


def test_the_norm_keeps_its_input_alone_for_backward() -> None:
    class Plain(nn.Module):
        variance_epsilon = 1e-5

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4096, device=CUDA, dtype=torch.bfloat16), requires_grad=False)

    norm = FusedRMSNorm(Plain())
    x = torch.randn(2048, 4096, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = norm(x)
    kept = torch.cuda.memory_allocated() - before - output.nbytes
    assert output.dtype == torch.bfloat16 and kept < 2**20
