"""Amounts as people read them. Imports no torch."""

from __future__ import annotations


def tell_size(num_bytes: float) -> str:
    """Four digits and a unit: 812 bytes, 2.516 MiB, 12.61 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.4g} GiB"
