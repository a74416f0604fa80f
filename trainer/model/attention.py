"""Attention over packed documents, through transformers' attention interface.

A packed row ``[1, tokens]`` holds documents end to end; `cu_seq_lens_q` says where each begins. Queries see only their
own document, causally. No mask of tokens x tokens is ever built, and none is accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from trainer.errors import UserError
from trainer.model import flash4
from trainer.processes import Processes

logger = logging.getLogger(__name__)

FLASH4 = "packed_fa4"  # transformers takes any name with "flash" in it for a kernel of its own to load
VARLEN = "packed_varlen"
BY_DOCUMENT = "packed_by_document"
Kernel = Callable[..., torch.Tensor]  # as `trainer.model.flash4.flash4`


def register_attention() -> None:
    """Makes all kinds known to transformers by their names. Calling it twice does no harm."""
    for name, function in PACKED_ATTENTION.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, refuse_padding)


def check_attention(wish: str, compute_dtype: str, device: torch.device) -> None:
    """What `choose_attention` would refuse on any model, at once.

    Raises:
        UserError: a kernel was asked for that does not run there.
    """
    if wish == "varlen" and not _can_varlen(compute_dtype, device):
        allowed = "varlen runs on CUDA in 16 bit"
        raise UserError("model.attention", f"varlen on {device.type} in {compute_dtype}", allowed, "use auto")
    if wish == "flash4" and (obstacle := flash4.find_obstacle(getattr(torch, compute_dtype), device)):
        raise _refuse_flash4(obstacle)


def choose_attention(wish: str, base: Any, compute_dtype: str, device: torch.device) -> str:
    """The registered name for `wish`, a ``model.attention``, on `device`.

    Args:
        base: the model's own config, for the heads that a kernel has to prove itself with.

    Raises:
        UserError: a kernel was asked for that does not run there, or not rightly.
    """
    check_attention(wish, compute_dtype, device)
    can_varlen = _can_varlen(compute_dtype, device)
    if wish == "flash4" or (wish == "auto" and can_varlen and flash4.is_installed()):
        fault = _find_fault(base, compute_dtype, device)
        if fault is None:
            return FLASH4
        if wish == "flash4":
            raise _refuse_flash4(fault)
        logger.warning("%s is installed but not used: %s", flash4.PACKAGE, fault)
    return VARLEN if can_varlen and wish != "sdpa" else BY_DOCUMENT


def agree_on_attention(causal_lm: Any, processes: Processes) -> None:
    """One kind on all processes, for what they plan depends on it: torch's where flash-attn-4 failed one of them."""
    kinds = processes.gather(causal_lm.config._attn_implementation)
    if len(set(kinds)) == 1:
        return
    failed = ", ".join(str(rank) for rank, kind in enumerate(kinds) if kind != FLASH4)
    logger.warning("%s is used by nobody: rank %s cannot, and its log says why", flash4.PACKAGE, failed)
    causal_lm.set_attn_implementation(VARLEN)


def _can_varlen(compute_dtype: str, device: torch.device) -> bool:
    return device.type == "cuda" and compute_dtype != "float32"


def _refuse_flash4(fault: str) -> UserError:
    return UserError("model.attention", "flash4", f"{flash4.PACKAGE} where it proves right: {fault}", "use auto")


def _find_fault(base: Any, compute_dtype: str, device: torch.device) -> str | None:
    heads = base.num_attention_heads
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // heads
    kv_heads = getattr(base, "num_key_value_heads_per_layer", None) or [base.num_key_value_heads]
    dtype = getattr(torch, compute_dtype)
    faults = (flash4.find_fault(heads, count, head_dim, dtype, device) for count in sorted(set(kv_heads)))
    return next(filter(None, faults), None)


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    # What `torch.nn.attention.varlen.varlen_attn` calls, which in torch 2.11 takes no fewer heads of keys than of
    # queries; the kernel does, so that they need not be repeated, and kept so.
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale)[0]


def packed_attention(
    kernel: Kernel,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Flash attention for documents of different lengths.

    Args:
        kernel: computes it; in 16 bit. Everything else is done by document.
        query: ``[1, heads, tokens, head_dim]``; `key` and `value` the same, with fewer heads under GQA.
        cu_seq_lens_q: ``[documents + 1]`` int32, cumulative lengths from 0.
        max_length_q: length of the longest document.

    Returns:
        ``[1, tokens, heads, head_dim]`` and None (no attention weights).
    """
    if cu_seq_lens_q is None or max_length_q is None or value.dtype == torch.float32 or value.shape[-1] % 8:
        return document_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs)
    # Squeezed: the gradient of an index is a tensor of zeros with a copy in it. Float32 norms and rotary tables under
    # autocast leave query and key in float32; the kernel wants one dtype.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling).unsqueeze(0), None


def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal ``scaled_dot_product_attention``, one document after the other; exact on any device and dtype.

    Arguments as in `packed_attention`. Without `cu_seq_lens_q` every row is one document.

    Raises:
        ValueError: keys and queries differ in length, as with a KV cache.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError("packed attention has no KV cache: generate inside `cached_attention(model)`")
    key, value = _repeat_heads(query, key, value)
    query, key = query.to(value.dtype), key.to(value.dtype)
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def refuse_padding(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Stands where transformers would build a mask: packed rows have none.

    Raises:
        ValueError: a mask that hides something, which these kernels would ignore silently.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("packed attention takes no padding: run padded rows inside `cached_attention(model)`")


varlen_attention = partial(packed_attention, _torch_varlen)
flash4_attention = partial(packed_attention, flash4.flash4)
PACKED_ATTENTION: dict[str, Callable[..., Any]] = {
    FLASH4: flash4_attention,
    VARLEN: varlen_attention,
    BY_DOCUMENT: document_attention,
}


@contextmanager
def cached_attention(model: nn.Module) -> Iterator[None]:
    """Generation inside: padded rows and a KV cache by transformers' own sdpa; packed attention again after it."""
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config, generation = causal_lm.config, causal_lm.generation_config
    before = config._attn_implementation, config.use_cache, generation.use_cache
    causal_lm.set_attn_implementation("sdpa")
    config.use_cache = generation.use_cache = True
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before[0])
        config.use_cache, generation.use_cache = before[1:]
