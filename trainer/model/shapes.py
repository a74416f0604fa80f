"""Published shapes of the Llama family, so that `model.init: random` needs neither weights nor a network.

Sources: the `config.json` of each model on the Hugging Face hub. Imports no torch.
"""

from __future__ import annotations

from typing import Any

LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "bos_token_id": 128000, "eos_token_id": 128001}
LLAMA_31 = {**LLAMA_3, "max_position_embeddings": 131072}


def _rope(theta: float, factor: float | None = None) -> dict[str, Any]:
    if factor is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shape(
    common: dict[str, Any],
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    rope: dict[str, Any],
    tied: bool = False,
) -> dict[str, Any]:
    return {
        **common,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.02,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "TinyLlama-1.1B": _shape({**LLAMA_2, "max_position_embeddings": 2048}, 2048, 5632, 22, 32, 4, _rope(1e4)),
    "Llama-2-7b": _shape(LLAMA_2, 4096, 11008, 32, 32, 32, _rope(1e4)),
    "Llama-2-13b": _shape(LLAMA_2, 5120, 13824, 40, 40, 40, _rope(1e4)),
    "Llama-2-70b": _shape(LLAMA_2, 8192, 28672, 80, 64, 8, _rope(1e4)),
    "Llama-3-8B": _shape(LLAMA_3, 4096, 14336, 32, 32, 8, _rope(5e5)),
    "Llama-3-70B": _shape(LLAMA_3, 8192, 28672, 80, 64, 8, _rope(5e5)),
    "Llama-3.1-8B": _shape(LLAMA_31, 4096, 14336, 32, 32, 8, _rope(5e5, 8.0)),
    "Llama-3.1-70B": _shape(LLAMA_31, 8192, 28672, 80, 64, 8, _rope(5e5, 8.0)),
    "Llama-3.1-405B": _shape(LLAMA_31, 16384, 53248, 126, 128, 8, _rope(5e5, 8.0)),
    "Llama-3.2-1B": _shape(LLAMA_31, 2048, 8192, 16, 32, 8, _rope(5e5, 32.0), tied=True),
    "Llama-3.2-3B": _shape(LLAMA_31, 3072, 8192, 28, 24, 8, _rope(5e5, 32.0), tied=True),
    "Llama-3.3-70B": _shape(LLAMA_31, 8192, 28672, 80, 64, 8, _rope(5e5, 8.0)),
}
OWNERS = ("meta-llama", "NousResearch", "TinyLlama", "unsloth")
VARIANTS = ("-chat-hf", "-hf", "-chat", "-Instruct")


def published_shape(hub_id: str) -> dict[str, Any] | None:
    """Keyword arguments of `LlamaConfig` for a published model (chat and instruct variants, known mirrors), or None."""
    owner, _, name = hub_id.partition("/")
    if owner not in OWNERS:
        return None
    name = name.removeprefix("Meta-")
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    if owner == "TinyLlama" and name.startswith("TinyLlama-1.1B"):
        name = "TinyLlama-1.1B"
    return SHAPES.get(name)
