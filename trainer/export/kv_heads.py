"""One number of key and value heads in all layers, where a model was trained with several: heads are repeated.

A query head reads the same numbers then, so the model computes the same. Imports no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class KVHeads:
    """The key and value heads that every layer of an exported model has.

    Attributes:
        number: of them.
        size: rows of a projection that make one.
    """

    number: int
    size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> KVHeads:
        """Those of an exported model's ``config.json``."""
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(config["num_key_value_heads"], size)

    def shape(self, name: str, trained: tuple[int, ...]) -> torch.Size:
        """Shape of the exported tensor that was trained in another."""
        rows = self.number * self.size if _is_projection(name) else trained[0]
        return torch.Size((rows, *trained[1:]))

    def repeat(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of `shape`: each head of a key or value projection as often as it takes; any other as it is."""
        if tensor.shape == self.shape(name, tuple(tensor.shape)):
            return tensor
        heads = tensor.unflatten(0, (-1, self.size))
        return heads.repeat_interleave(self.number // len(heads), dim=0).flatten(0, 1)


def _is_projection(name: str) -> bool:
    """Whether `name` is the weight or bias of a layer's key or value projection."""
    return name.rpartition(".")[0].endswith(PROJECTIONS)
