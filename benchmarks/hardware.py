"""What the machine itself can do: a large matmul, and attention among packed documents with a mask and without.

Run by speed.py in a process of its own. Attention is timed as trainers compute it: ``sdpa`` under a mask of
[rows, 1, tokens, tokens], or by document (torch's ``varlen_attn``; on a CPU one document after the other).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

TIMES = 5
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Prints one line: RESULT and the figures."""
    job = json.loads(sys.argv[1])
    device = torch.device(job["device"])
    figures = {
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "matmul_flops": measure_matmul(device, 8192 if device.type == "cuda" else 512),
        "attention": [measure_attention(job["shape"], job["lengths"], rows, device) for rows in (None, *job["rows"])],
    }
    print("RESULT " + json.dumps(figures), flush=True)


def measure_matmul(device: torch.device, size: int) -> float:
    """FLOP/s of a square bfloat16 product."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def measure_attention(
    shape: dict[str, Any], lengths: list[int], rows: list[int] | None, device: torch.device
) -> dict[str, Any]:
    """Seconds of one layer's attention over documents of `lengths`, the forward alone and with the backward.

    Args:
        rows: [rows, tokens] that one forward of a trainer with a mask takes; together they are all of the documents'
            tokens or a part that is computed as often as needed. None: by document.
    """
    total = sum(lengths)
    num_forwards, laid_out = (1, [1, total]) if rows is None else (total // (rows[0] * rows[1]), rows)
    attend = _by_document(lengths, device) if rows is None else _masked(lengths, rows, device)
    heads = [shape["num_attention_heads"], shape["num_key_value_heads"], shape["num_key_value_heads"]]
    q, k, v = (
        torch.randn(
            laid_out[0], laid_out[1], count, shape["head_dim"], device=device, dtype=torch.bfloat16, requires_grad=True
        )
        for count in heads
    )

    def forward_backward() -> None:
        out = attend(q, k, v)
        out.backward(torch.ones_like(out))
        q.grad = k.grad = v.grad = None

    with torch.no_grad():
        forward = _seconds(lambda: attend(q, k, v), device)
    return {
        "rows": rows,
        "forward_s": num_forwards * forward,
        "forward_backward_s": num_forwards * _seconds(forward_backward, device),
    }


def _masked(lengths: list[int], rows: list[int], device: torch.device) -> Attention:
    """As transformers does it without flash attention; keys and values are repeated for grouped queries."""
    counts = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)[: rows[0] * rows[1]]
    document = document.view(rows)
    causal = torch.ones(rows[1], rows[1], dtype=torch.bool, device=device).tril()
    mask = (document[:, None, :, None] == document[:, None, None, :]) & causal

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)

    return attend


def _by_document(lengths: list[int], device: torch.device) -> Attention:
    if device.type == "cpu":
        return lambda q, k, v: torch.cat(
            [
                sdpa(*(x.transpose(1, 2) for x in part), is_causal=True, enable_gqa=True)
                for part in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
            ],
            2,
        )
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[2] // k.shape[2]  # torch 2.11 has no enable_gqa here
        k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
        return varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, window_size=(-1, 0))

    return attend


def _seconds(compute: Callable[[], Any], device: torch.device) -> float:
    """Median over some calls after two to warm up."""
    taken = []
    for _ in range(TIMES + 2):
        _wait(device)
        started = time.perf_counter()
        compute()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
