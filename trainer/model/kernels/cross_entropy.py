"""Cross entropy of rows of logits and its gradient in their place: two passes over them instead of eight."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

BLOCK = 8192  # logits a program holds at a time


def is_in_place(device: torch.device) -> bool:
    """Whether `cross_entropy_` makes no copy of the logits there."""
    return triton is not None and device.type == "cuda"


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, needs_grad: bool) -> torch.Tensor:
    """Losses of rows, computed in float32; with `needs_grad` their gradient takes the place of the logits.

    Args:
        logits: ``[rows, vocab_size]``, contiguous.
        targets: ``[rows]`` int64, contiguous.

    Returns:
        ``[rows]`` float32. A row with a NaN among its logits has a loss and a gradient of NaN, and so has, on CUDA, one
        whose target is no column.

    Raises:
        RuntimeError: on a CPU, a target is no column.
    """
    assert logits.is_contiguous() and targets.is_contiguous()
    if not is_in_place(logits.device):
        return _by_torch(logits, targets, needs_grad)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _kernel[(len(logits),)](logits, targets, losses, logits.shape[1], NEEDS_GRAD=needs_grad, BLOCK=BLOCK, num_warps=16)
    return losses


def _by_torch(logits: torch.Tensor, targets: torch.Tensor, needs_grad: bool) -> torch.Tensor:
    wide, column = logits.float(), targets.unsqueeze(-1)
    log_normalizer = wide.logsumexp(dim=-1, keepdim=True)
    losses = (log_normalizer - wide.gather(-1, column)).squeeze(-1)
    if needs_grad:
        wide = (wide - log_normalizer).exp_()
        logits.copy_(wide.scatter_add_(-1, column, -torch.ones_like(column, dtype=wide.dtype)))
    return losses


if triton is not None:

    @triton.jit
    def _kernel(logits_ptr, targets_ptr, losses_ptr, vocab_size, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * vocab_size
        target = tl.load(targets_ptr + row)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):  # each lane its own largest and sum, brought together at the end
            at = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
            known = larger != float("-inf")
            total = tl.where(known, total * tl.exp(largest - larger) + tl.exp(logits - larger), 0.0)
            largest = larger
        top = tl.max(largest)  # of lanes without NaN, if there are such: the others' sums are NaN
        total = tl.where(largest != float("-inf"), total * tl.exp(largest - top), 0.0)
        is_column = (target >= 0) & (target < vocab_size)  # nothing is read beyond the row
        log_normalizer = tl.where(is_column, top + tl.log(tl.sum(total)), float("nan"))
        chosen = tl.load(logits_ptr + target, mask=is_column, other=0.0).to(tl.float32)
        tl.store(losses_ptr + row, log_normalizer - chosen)
        if NEEDS_GRAD:
            tl.debug_barrier()  # the target's logit is read before it is written over
            for start in range(0, vocab_size, BLOCK):
                at = start + tl.arange(0, BLOCK)
                logits = tl.load(logits_ptr + at, mask=at < vocab_size, other=0.0).to(tl.float32)
                grad = tl.exp(logits - log_normalizer) - tl.where(at == target, 1.0, 0.0)
                tl.store(logits_ptr + at, grad.to(logits_ptr.dtype.element_ty), mask=at < vocab_size)
