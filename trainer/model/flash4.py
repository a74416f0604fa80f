"""flash-attn-4's kernels, where they are installed and prove right for a model's heads.

From Hopper on they take half of the time of torch's own for long documents. The package is a beta that compiles what
is called; of 4.0.0b36 a wrong gradient was seen, for heads of 80. So a process first compares it with attention by
document, forward and backward, for the very heads of the model and documents of each kind that it has a kernel for.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

from trainer.caches import cache_root
from trainer.errors import PacktrainError, first_line

PACKAGE = "flash-attn-4"
MIN_CAPABILITY = (9, 0)
# What it compiles depends on whether there are more than 256 documents, and on which blocks the longest one fits in.
# It is told of no shorter one than this, which fits in none: so two kinds of kernels are all that there are.
LEAST_BOUND = 512
CASES = {
    "documents of up to 318 tokens": (129, 1, 64, 318),
    "300 documents, one of 700 tokens": (*(2 + number % 29 for number in range(299)), 700),
    "a document of 2,500 tokens": (2500, 7),
}
# Relative to the norm. Kernels differ from float32 by 0.003 in bfloat16; what was wrong differed by 1.3.
TOLERANCE = 0.02
FIX = "set model.attention: varlen, which is torch's, or take another version"


def is_installed() -> bool:
    """Whether there is something to try."""
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, whatever the model; takes no time."""
    if device.type != "cuda" or dtype == torch.float32:
        return f"it runs on CUDA in 16 bit, and this is {device.type} in {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"it runs from compute capability 9.0 on, and this GPU has {'.'.join(map(str, capability))}"
    return None if is_installed() else f"{PACKAGE} is not installed"


@cache
def find_fault(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels are not for such a model on `device`; None where they proved right.

    Takes them some seconds a case to compile the first time; what is compiled is kept for the next start.

    Raises:
        PacktrainError: they left the GPU unusable.
    """
    if obstacle := find_obstacle(dtype, device):
        return obstacle
    wrong = []
    for case, lengths in CASES.items():
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")  # its compiler's, of its own arguments
                errors = compare(lengths, heads, kv_heads, head_dim, dtype, device)
        except torch.AcceleratorError as error:
            raise PacktrainError(f"{PACKAGE} broke the GPU's context: {first_line(error)}\n  fix: {FIX}") from error
        except Exception as error:  # whatever a compiler at work on another's GPU and libraries may raise
            return first_line(error)
        wrong += [f"{name} of {case} by {error:.2g}" for name, error in errors.items() if not error < TOLERANCE]
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

    Raises:
        PacktrainError: it failed.
        torch.OutOfMemoryError, torch.AcceleratorError: as from any kernel.
    """
    bound = max(longest, LEAST_BOUND)
    try:
        output = _kernel()(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=bound, max_seqlen_k=bound,
            softmax_scale=scale, causal=True,
        )  # fmt: skip
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise PacktrainError(f"{PACKAGE} failed: {first_line(error)}\n  fix: {FIX}") from error
    return output[0] if isinstance(output, tuple) else output


def compare(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Errors of output, with and without gradients wanted, and of gradients, relative to their norms in float32."""
    generator = torch.Generator(device).manual_seed(0)  # training's own is left alone
    shapes = [(sum(lengths), count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    *inputs, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash4(q, k, v, boundaries, max(lengths), None)

    def by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        wide = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in wide), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
        return torch.cat(outputs, 1).transpose(0, 1)

    wanted = _run(by_document, [x.float() for x in inputs], grad.float())
    found = _run(packed, inputs, grad)
    with torch.no_grad():
        alone = packed(*inputs)
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values", "output without gradients")
    pairs = zip(names, [*found, alone], [*wanted, wanted[0]], strict=True)
    return {name: float((ours.float() - exact).norm() / exact.norm()) for name, ours, exact in pairs}


def _run(kernel: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = kernel(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@cache
def _kernel() -> Callable[..., torch.Tensor]:
    """The library's, imported. It keeps what it compiles where locks work, as it waits for them in vain elsewhere."""
    folder = cache_root() / PACKAGE
    if _takes_locks(folder):
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def _takes_locks(folder: Path) -> bool:
    probe = folder / f"probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return True
