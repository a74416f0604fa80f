"""A PEFT adapter as plain tensors: low-rank pairs by module, and tensors that replace the base's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from trainer.config import AdapterConfig
from trainer.errors import UserError
from trainer.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NEVER_SET, check_adapter, read_tensors

PREFIX = "base_model.model."
BLOCK_ELEMENTS = 2**26  # of a weight that are float32 at a time on a GPU
ELEMENTS_A_THREAD = 2**18  # likewise for each thread of a CPU: what its cache holds
LEAST_ROWS = 64  # of fewer a matmul adds up in another order than of the whole matrix
# Each of these makes the adapter more than W + scale * B @ A (with DoRA's magnitude), or changes its layout.
UNSUPPORTED = tuple(name for name in NEVER_SET if name not in ("alpha_pattern", "rank_pattern"))


@dataclass
class LowRank:
    """One module's adapter.

    Attributes:
        a: ``[r, in]``. b: ``[out, r]``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        magnitude: ``[out]``, DoRA's row norms; None without DoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether merging it would change nothing: B as it was initialised."""
        return self.magnitude is None and not (bool(self.b.any()) and bool(self.a.any()))

    def merge_into(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``W + scale * B @ A`` in float32; with DoRA its rows rescaled to `magnitude` (arXiv:2402.09353, eq. 5).

        A block of rows at a time is in float32, which also keeps it in the processor's caches.

        Args:
            weight: ``[out, in]``, any float dtype, on any device; written over if it is of `dtype`.
            dtype: of the result.
        """
        merged = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
        a = self.a.to(weight.device, torch.float32)
        num_rows = max(LEAST_ROWS, _block_elements(weight.device) // weight.shape[1])
        scratch = torch.empty(min(num_rows, len(weight)), weight.shape[1], dtype=torch.float32, device=weight.device)
        for start in range(0, len(weight), num_rows):
            rows = slice(start, start + num_rows)
            b = self.b[rows].to(weight.device, torch.float32)
            block = scratch[: len(b)].copy_(weight[rows]).addmm_(b, a, alpha=self.scale)
            if self.magnitude is not None:
                norm = torch.linalg.vector_norm(block, dim=1)
                block *= (self.magnitude[rows].to(weight.device, torch.float32) / norm).unsqueeze(1)
            merged[rows] = block
        return merged


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        config: ``adapter_config.json``.
        low_rank: module name -> its pair.
        replaced: tensor name -> the tensor that takes the base's place (modules_to_save, resized embeddings).
    """

    config: dict[str, Any]
    low_rank: dict[str, LowRank]
    replaced: dict[str, torch.Tensor]

    def changes(self, tensor: str) -> bool:
        """Whether merging touches this tensor."""
        return tensor in self.replaced or tensor.removesuffix(".weight") in self.low_rank


def read_adapter(folder: Path, recipe: AdapterConfig | None = None) -> Adapter:
    """Reads a folder in PEFT's format.

    Args:
        recipe: what the adapter was trained as, where that is known.

    Raises:
        UserError: files missing or broken, numbers that are not finite, a kind of adapter that cannot be merged, keys
            of another form than PEFT's, or a config other than the recipe's.
    """
    check_adapter(folder, recipe)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if used := [name for name in UNSUPPORTED if config.get(name)]:
        raise UserError(str(folder / ADAPTER_CONFIG), f"{used[0]}: {config[used[0]]}", "LoRA, rsLoRA, DoRA on linears")
    return _sort_tensors(folder, config, read_tensors(folder, recipe))


def _sort_tensors(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Adapter:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    replaced = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise UserError(str(folder / ADAPTER_WEIGHTS), f"key {key}", f"keys that begin with {PREFIX}")
        name = key.removeprefix(PREFIX)
        module, found, part = name.partition(".lora_")
        if found:
            parts.setdefault(module, {})[part.removesuffix(".weight")] = tensor
        else:
            replaced[name.replace(".base_layer.", ".")] = tensor
    allowed = {"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}
    for module, found_parts in parts.items():
        if set(found_parts) != allowed:
            names = ", ".join(f"lora_{part}" for part in sorted(found_parts))
            raise UserError(
                str(folder / ADAPTER_WEIGHTS), f"{module} has {names}", ", ".join(f"lora_{p}" for p in sorted(allowed))
            )
        _check_rank(folder, config, module, found_parts["A"].shape[0])
    low_rank = {
        module: LowRank(p["A"], p["B"], _scale(config, module, p["A"].shape[0]), p.get("magnitude_vector"))
        for module, p in parts.items()
    }
    return Adapter(config, low_rank, replaced)


def _block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS if device.type == "cuda" else ELEMENTS_A_THREAD * max(4, torch.get_num_threads())


def _check_rank(folder: Path, config: dict[str, Any], module: str, rank: int) -> None:
    """The scale depends on the rank: tensors and config must agree on it."""
    patterns = config.get("rank_pattern") or {}
    configured = patterns.get(get_pattern_key(list(patterns), module), config["r"])
    if configured != rank:
        raise UserError(str(folder / ADAPTER_CONFIG), f"r {configured}", f"{rank}, by {module}'s tensors")


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
