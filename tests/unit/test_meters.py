"""FLOPs of a token against published shapes and torch's own counter; the meter against a clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.metrics.meters import (
    ThroughputMeter,
    TokenFlops,
    device_peak_flops,
    flops_per_token,
    mean_attended_positions,
)
from trainer.planning.hardware import peak_bf16_flops
from trainer.readings import Moment

CPU = torch.device("cpu")
LLAMA_2_7B = SimpleNamespace(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
LLAMA_2_70B = SimpleNamespace(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
)
LORA_R16_7B = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # r (in + out) of seven linears a layer


def test_seven_billion_full_matches_six_n_plus_three_a() -> None:
    num_weights = 6_738_415_616 - 32000 * 4096 - (2 * 32 + 1) * 4096  # published size less embedding and norms
    flops = flops_per_token(LLAMA_2_7B, trains_base=True, mean_attended=2048)
    assert flops.total(1, 1) == pytest.approx(6 * num_weights + 3 * 4 * 32 * 4096 * 2048, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "trains_base", "adapter", "ceiling"),
    [
        (LLAMA_2_7B, True, 0, 18_384),
        (LLAMA_2_7B, False, LORA_R16_7B, 26_364),
        (LLAMA_2_70B, True, 0, 1_839),
    ],
)
def test_tokens_a_second_at_788_tflops(
    config: SimpleNamespace, trains_base: bool, adapter: int, ceiling: float
) -> None:
    flops = flops_per_token(config, trains_base, mean_attended=2048, num_adapter_params=adapter)
    assert 788e12 / flops.total(1, 1) == pytest.approx(ceiling, rel=1e-3)


@pytest.mark.parametrize("trains_base", [True, False])
def test_matches_what_torch_counts_in_a_real_model(trains_base: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    if not trains_base:
        model.requires_grad_(False)
    length = 24
    embeddings = torch.randn(1, length, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    flops = flops_per_token(config, trains_base, mean_attended=length)  # eager attention computes the whole square
    assert counter.get_total_flops() == pytest.approx(flops.total(length, length), rel=1e-3)


def test_head_counts_for_trained_tokens_only() -> None:
    flops = flops_per_token(LLAMA_2_7B, trains_base=False, mean_attended=100)
    assert flops.total(10, 10) - flops.total(10, 0) == 10 * 4 * 4096 * 32000


def test_mean_attended_positions_of_short_documents() -> None:
    assert mean_attended_positions([1]) == 1
    assert mean_attended_positions([3, 1]) == (1 + 2 + 3 + 1) / 4
    assert mean_attended_positions([]) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak


def test_meter_divides_by_time_since_the_last_step_less_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trainer.readings.perf_counter", lambda: now[0])
    meter = ThroughputMeter(TokenFlops(every=5.0, trained=10.0), peak_flops=1000.0, device=CPU)
    now[0] += 2
    ended = Moment(CPU)
    now[0] += 7  # read late
    assert meter.record(tokens=100, trained_tokens=50, ended=ended) == {
        "tokens_per_second": 50.0,
        "mfu": (5 * 100 + 10 * 50) / 2 / 1000,
        "gpu_memory_gib": None,
        "seconds": 2.0,
    }
    now[0] += 1
    assert meter.record(tokens=100, trained_tokens=50, ended=Moment(CPU))["seconds"] == 8.0
    with meter.paused():
        now[0] += 60
    now[0] += 3
    assert meter.record(tokens=100, trained_tokens=50, ended=Moment(CPU))["seconds"] == 3.0


def test_no_mfu_on_cpu() -> None:
    meter = ThroughputMeter(TokenFlops(1.0, 1.0), device_peak_flops(CPU), CPU)
    record = meter.record(tokens=8, trained_tokens=4, ended=Moment(CPU))
    assert record["mfu"] is None and (record["tokens_per_second"] or 0) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_the_peak_allocated_on_the_gpu() -> None:
    device = torch.device("cuda", 0)
    torch.empty(2**28, dtype=torch.float32, device=device)
    memory = ThroughputMeter(TokenFlops(1.0, 1.0), None, device).record(1, 1, Moment(device))["gpu_memory_gib"]
    assert memory is not None and memory >= 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seconds_are_the_gpus_however_late_they_are_read() -> None:
    device = torch.device("cuda", 0)
    meter, ends = ThroughputMeter(TokenFlops(1.0, 1.0), None, device), []
    for _ in range(3):
        torch.cuda._sleep(2 * 10**8)  # cycles: some 0.1 s
        ends.append(Moment(device))
    seconds = [meter.record(1, 1, end)["seconds"] for end in ends]
    assert seconds[1:] == pytest.approx(seconds[:-1], rel=0.3)
