"""The sizes of a Llama-family model, and how many weights they make. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """Sizes by the names that ``config.json`` has for them.

    Attributes:
        query: width of all heads together, `key_value` of all key-value heads of a layer, from the bottom.
        tied: the head is the embeddings.
    """

    hidden: int
    intermediate: int
    heads: int
    query: int
    key_value: tuple[int, ...]
    vocab: int
    tied: bool

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the fields of a ``config.json``.

        Raises:
            KeyError: a size is missing.
            ValueError: one is no number above 0.
        """
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            if type(config[name]) is not int or config[name] < 1:
                raise ValueError(f"{name} is {config[name]!r}")
        hidden, heads, layers = (
            config[f"{name}"] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads_per_layer") or [config.get("num_key_value_heads") or heads] * layers
        return cls(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            query=heads * head_dim,
            key_value=tuple(number * head_dim for number in kv_heads),
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.key_value)

    @property
    def mean_key_value(self) -> float:
        """`key_value`, mean over layers."""
        return sum(self.key_value) / self.num_layers

    def linears(self, key_value: float) -> dict[str, tuple[float, float]]:
        """``(in, out)`` of the matrices, by name, of a layer whose key-value heads are together so wide."""
        hidden, wide, query = self.hidden, self.intermediate, self.query
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }

    @cached_property
    def layer_weights(self) -> float:
        """Weights of a layer's matrices, mean over layers."""
        return sum(rows * columns for rows, columns in self.linears(self.mean_key_value).values())

    @cached_property
    def linear_weights(self) -> int:
        """Weights of all layers' matrices."""
        return round(self.num_layers * self.layer_weights)

    @property
    def norm_weights(self) -> int:
        """Weights of all norms."""
        return (2 * self.num_layers + 1) * self.hidden

    @property
    def embedding_weights(self) -> int:
        """Weights of the embeddings, and of the head where it is its own."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All of them."""
        return self.linear_weights + self.norm_weights + self.embedding_weights
