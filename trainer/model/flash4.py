"""flash-attn-4's kernels, where they are installed and prove right for a model's heads.

From Hopper on they take half of the time of torch's own for long documents. The package is a beta that compiles what
is called; of 4.0.0b36 a wrong gradient was seen, for heads of 80. So nothing is computed with it before this process
has compared it with attention by document, forward and backward, for the very heads of the model.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from trainer.caches import cache_root

PACKAGE = "flash-attn-4"
MIN_CAPABILITY = (9, 0)
LENGTHS = (129, 1, 64, 318)  # of the documents compared: around the kernels' tiles, and less than one
# Relative to the norm. Kernels differ from float32 by 0.002 in bfloat16; what was wrong differed by 1.3.
TOLERANCE = 0.02


def is_installed() -> bool:
    """Whether there is something to try."""
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@cache
def find_fault(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels are not for such a model on `device`; None where they proved right, which takes them seconds
    to compile the first time, and nothing is left to compile then.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return "it runs on CUDA in 16 bit"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"it runs on GPUs of compute capability {'.'.join(map(str, MIN_CAPABILITY))} and above"
    if not is_installed():
        return f"{PACKAGE} is not installed"
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # its compiler's, of its own arguments
            errors = _compare(heads, kv_heads, head_dim, dtype, device)
    except Exception as error:  # whatever a compiler at work on another's GPU and libraries may raise
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error < TOLERANCE]
    return f"wrong for heads of {head_dim}: {', '.join(wrong)} of its norm" if wrong else None


def flash4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Causal attention of documents.

    Args:
        q: ``[tokens, heads, head_dim]``; `k` and `v` with as many heads or fewer.
        cu_seqlens: ``[documents + 1]`` int32.
        longest: tokens of the longest document.
        scale: of the scores; None: ``head_dim ** -0.5``.

    Returns:
        ``[tokens, heads, head_dim]``.
    """
    # Compiled kernels are kept for the next start. The library reads both when it is imported.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_root() / PACKAGE))
    from flash_attn.cute import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return output[0] if isinstance(output, tuple) else output


def _compare(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Errors of output and gradients, relative to their norms in float32."""
    generator = torch.Generator(device).manual_seed(0)  # training's own is left alone
    shapes = [(sum(LENGTHS), count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    *inputs, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    found, wanted = (
        _run(kernel, [x.to(to) for x in inputs], grad.to(to))
        for kernel, to in ((_packed, dtype), (_by_document, torch.float32))
    )
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    return {
        name: float((ours.float() - exact).norm() / exact.norm())
        for name, ours, exact in zip(names, found, wanted, strict=True)
    }


def _run(kernel: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = kernel(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=q.device)
    return flash4(q, k, v, boundaries, max(LENGTHS), None)


def _by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    wide = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    parts = zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in wide), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
    return torch.cat(outputs, 1).transpose(0, 1)
