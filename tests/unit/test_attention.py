"""Packed documents never see each other, and each is computed as if it stood alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.errors import PacktrainError, UserError
from trainer.model import flash4
from trainer.model.attention import (
    BY_DOCUMENT,
    FLASH4,
    VARLEN,
    agree_on_attention,
    cached_attention,
    choose_attention,
    document_attention,
    register_attention,
)

LENGTHS = [7, 1, 12, 4]
BASE = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def build(kv_heads: int, attention: str = BY_DOCUMENT) -> LlamaForCausalLM:
    register_attention()
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,  # attention that matters
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]


def packed_inputs(documents: list[torch.Tensor]) -> dict[str, Any]:
    lengths = [len(document) for document in documents]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


@pytest.mark.parametrize("attention", [BY_DOCUMENT, VARLEN])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@torch.no_grad()
def test_packed_logits_equal_each_document_alone(kv_heads: int, attention: str, documents: list[torch.Tensor]) -> None:
    model, reference = build(kv_heads, attention), build(kv_heads, "eager")

    packed = model(**packed_inputs(documents)).logits[0].split(LENGTHS)

    for document, logits in zip(documents, packed, strict=True):
        torch.testing.assert_close(logits, reference(document[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_changing_one_document_moves_no_other(kv_heads: int, documents: list[torch.Tensor]) -> None:
    model = build(kv_heads)
    before = model(**packed_inputs(documents)).logits[0].split(LENGTHS)

    for changed in range(len(documents)):
        others = [d.clone() for d in documents]
        others[changed] = (others[changed] + 11) % 96 + 1
        after = model(**packed_inputs(others)).logits[0].split(LENGTHS)
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old, new) == (i != changed)


@torch.no_grad()
def test_later_tokens_do_not_reach_back(documents: list[torch.Tensor]) -> None:
    model = build(2)
    before = model(**packed_inputs(documents)).logits[0].split(LENGTHS)[2]
    documents[2][-1] = documents[2][-1] % 96 + 1

    after = model(**packed_inputs(documents)).logits[0].split(LENGTHS)[2]

    assert torch.equal(after[:-1], before[:-1])
    assert not torch.equal(after[-1], before[-1])


@torch.no_grad()
def test_without_boundaries_every_row_is_a_document() -> None:
    ids = torch.randint(1, 97, (3, 9))
    torch.testing.assert_close(build(2)(ids, use_cache=False).logits, build(2, "eager")(ids).logits)


def test_padding_and_caches_are_refused() -> None:
    model, ids = build(4), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="padding"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="KV cache"):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_float32_queries_of_autocast_are_cast_to_the_values() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    output, _ = document_attention(nn.Identity(), query, key, torch.randn(1, 4, 5, 8, dtype=torch.bfloat16), None)
    assert output.dtype == torch.bfloat16


def test_generation_with_left_padding_equals_transformers_own() -> None:
    model, reference = build(2), build(2, "sdpa")
    ids = torch.randint(1, 97, (2, 6))
    ids[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
    model.config.use_cache = False

    with cached_attention(model):
        found = model.generate(**inputs)

    assert torch.equal(found, reference.generate(**inputs))
    assert model.config._attn_implementation == BY_DOCUMENT
    assert model.config.use_cache is False


def test_packed_attention_is_back_after_a_failure() -> None:
    model = build(2)
    with pytest.raises(KeyError), cached_attention(model):
        assert model.config._attn_implementation == "sdpa"
        raise KeyError
    assert model.config._attn_implementation == BY_DOCUMENT


@pytest.mark.parametrize(
    ("wish", "dtype", "device", "chosen"),
    [
        ("auto", "bfloat16", "cuda", VARLEN),
        ("varlen", "float16", "cuda", VARLEN),
        ("auto", "float32", "cuda", BY_DOCUMENT),
        ("sdpa", "bfloat16", "cuda", BY_DOCUMENT),
        ("auto", "bfloat16", "cpu", BY_DOCUMENT),
        ("varlen", "bfloat16", "cpu", None),
        ("varlen", "float32", "cuda", None),
        ("flash4", "bfloat16", "cpu", None),
        ("flash4", "float32", "cuda", None),
    ],
)
def test_choice(wish: str, dtype: str, device: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "is_installed", lambda: False)
    if chosen is None:
        with pytest.raises(UserError, match=r"model\.attention"):
            choose_attention(wish, BASE, dtype, torch.device(device))
    else:
        assert choose_attention(wish, BASE, dtype, torch.device(device)) == chosen


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """flash-attn-4 on a Hopper, whose comparison gives what a test says."""

    def finds(outcome: dict[str, float] | Exception, capability: tuple[int, int] = (9, 0)) -> None:
        def compare(*arguments: Any) -> dict[str, float]:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(flash4, "is_installed", lambda: True)
        monkeypatch.setattr(flash4, "compare", compare)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    flash4.find_fault.cache_clear()
    yield finds
    flash4.find_fault.cache_clear()


def test_flash4_is_taken_where_it_proves_right(installed: Callable[..., None]) -> None:
    installed({"output": 0.003, "gradient of keys": 0.004})
    for wish in ("auto", "flash4"):
        assert choose_attention(wish, BASE, "bfloat16", torch.device("cuda")) == FLASH4
    assert choose_attention("varlen", BASE, "bfloat16", torch.device("cuda")) == VARLEN
    assert choose_attention("sdpa", BASE, "bfloat16", torch.device("cuda")) == BY_DOCUMENT


@pytest.mark.parametrize(
    ("outcome", "capability", "said"),
    [
        ({"output": 0.003, "gradient of queries": 1.3}, (9, 0), "wrong for heads of 16: gradient of queries of"),
        ({"output": float("nan")}, (9, 0), "output of documents of up to 318 tokens by nan"),
        (ImportError("no cutlass"), (9, 0), "ImportError: no cutlass"),
        ({"output": 0.0}, (8, 0), "this GPU has 8.0"),
    ],
    ids=["wrong", "nan", "import", "older"],
)
def test_flash4_is_left_where_it_does_not(
    outcome: Any,
    capability: tuple[int, int],
    said: str,
    installed: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    installed(outcome, capability)
    assert choose_attention("auto", BASE, "bfloat16", torch.device("cuda")) == VARLEN
    assert "flash-attn-4 is installed but not used: " in caplog.text and said in caplog.text
    with pytest.raises(UserError, match=re.escape(said)):
        choose_attention("flash4", BASE, "bfloat16", torch.device("cuda"))


def test_a_kernel_that_breaks_the_device_ends_the_run(installed: Callable[..., None]) -> None:
    installed(torch.AcceleratorError("an illegal memory access"))
    with pytest.raises(PacktrainError, match=r"broke the GPU's context(.|\n)*set model\.attention: varlen"):
        choose_attention("auto", BASE, "bfloat16", torch.device("cuda"))


def test_all_processes_take_what_one_can(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Three:
        def __init__(self, *kinds: str) -> None:
            self.kinds = kinds

        def gather(self, own: str) -> list[str]:
            return list(self.kinds)

    model = build(2, FLASH4)
    agree_on_attention(model, Three(FLASH4, FLASH4, FLASH4))  # type: ignore[arg-type]
    assert model.config._attn_implementation == FLASH4 and not caplog.text
    agree_on_attention(model, Three(FLASH4, VARLEN, FLASH4))  # type: ignore[arg-type]
    assert model.config._attn_implementation == VARLEN and "rank 1 cannot" in caplog.text


def test_a_cache_without_locks_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash4._takes_locks(tmp_path / "new") and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    assert not flash4._takes_locks(tmp_path / "file" / "below")

    def refuse(*arguments: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert not flash4._takes_locks(tmp_path / "new") and not list((tmp_path / "new").iterdir())


def _right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], causal: bool = True) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    whole = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in whole), strict=True)
    attended = [nn.functional.scaled_dot_product_attention(*part, is_causal=causal) for part in parts]
    return torch.cat(attended, 1).transpose(0, 1)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].flip(-1)


KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "right": lambda q, k, v, lengths: _right(q, k, v, lengths),
    "documents see each other": lambda q, k, v, lengths: _right(q, k, v, [sum(lengths)]),
    "not causal": lambda q, k, v, lengths: _right(q, k, v, lengths, causal=False),
    "heads of keys in another order": lambda q, k, v, lengths: _right(q, k.flip(1), v.flip(1), lengths),
    "gradient of queries": lambda q, k, v, lengths: _right(_WrongGradient.apply(q), k, v, lengths),
    "gradient of values": lambda q, k, v, lengths: _right(q, k, _WrongGradient.apply(v), lengths),
    "no gradient of keys": lambda q, k, v, lengths: _right(q, k.detach() + 0 * k, v, lengths),
}


@pytest.mark.parametrize("fault", KERNELS)
def test_a_kernel_is_compared_before_it_is_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *_: Any) -> torch.Tensor:
        return KERNELS[fault](q, k, v, cu_seqlens.diff().tolist())

    monkeypatch.setattr(flash4, "flash4", kernel)
    state = torch.get_rng_state()
    lengths = flash4.CASES["documents of up to 318 tokens"]
    errors = flash4.compare(lengths, 4, 2, 16, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    if fault == "right":
        assert max(errors.values()) < flash4.TOLERANCE / 2
    else:
        assert max(errors.values()) > 10 * flash4.TOLERANCE
