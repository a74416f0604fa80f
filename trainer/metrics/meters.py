"""How fast a run is, and how far that is from the hardware's ceiling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.planning.hardware import peak_bf16_flops
from trainer.readings import Moment

GIB = 2**30


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_bf16_flops` of a CUDA device; None for any other."""
    return peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class TokenFlops:
    """Floating point operations that one step has to do, per token.

    Attributes:
        every: for each token.
        trained: on top, for each token that counts in the loss: the head runs at those positions alone.
    """

    every: float
    trained: float

    def total(self, tokens: int, trained_tokens: int) -> float:
        """Operations for `tokens` tokens, `trained_tokens` of them in the loss."""
        return self.every * tokens + self.trained * trained_tokens


def flops_per_token(
    model_config: Any, trains_base: bool, mean_attended: float, num_adapter_params: int = 0
) -> TokenFlops:
    """Model FLOPs of forward and backward of a Llama-family model, per token.

    With N the weights of matrix multiplications (no embeddings, no norms) and A the attention's forward, a token costs
    ``6N + 3A`` when the base is trained and ``4N + 3A + 6 N_adapter`` when it is frozen: forward 2N, gradient of the
    activations 2N, gradient of the weights 2N (Kaplan et al., arXiv:2001.08361; PaLM, arXiv:2204.02311, appendix B).
    A is ``4 * layers * heads * head_dim * mean_attended``: scores and weighted sum over the positions a token really
    attends to in its own document, where PaLM's formula takes all of a full sequence. N has the head, but only for
    trained tokens, as the loss skips all others. Recomputed activations are work of the implementation, not of the
    model, and do not count; so MFU here is never higher than the share of the hardware that is busy.

    Args:
        model_config: has hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size, and
            optionally num_key_value_heads and head_dim, as transformers' LlamaConfig; num_key_value_heads_per_layer
            where layers differ.
        trains_base: whether the base's weights are trained (full) or frozen (LoRA, QLoRA).
        mean_attended: positions attended to, mean over tokens; see `mean_attended_positions`.
        num_adapter_params: trained adapter weights.
    """
    heads = model_config.num_attention_heads
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    layers, hidden = model_config.num_hidden_layers, model_config.hidden_size
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    kv_heads_of_all = sum(getattr(model_config, "num_key_value_heads_per_layer", None) or [kv_heads] * layers)

    projections = 2 * hidden * head_dim * (layers * heads + kv_heads_of_all)
    feed_forward = 3 * layers * hidden * model_config.intermediate_size
    attention = 4 * layers * heads * head_dim * mean_attended
    per_weight = 6 if trains_base else 4
    return TokenFlops(
        every=per_weight * (projections + feed_forward) + 3 * attention + 6 * num_adapter_params,
        trained=per_weight * hidden * model_config.vocab_size,
    )


def mean_attended_positions(document_lengths: Iterable[int]) -> float:
    """Mean over tokens of the positions each attends to, itself included, in causal documents of these lengths."""
    lengths = list(document_lengths)
    tokens = sum(lengths)
    return sum(length * (length + 1) / 2 for length in lengths) / tokens if tokens else 0.0


class ThroughputMeter:
    """Tokens a second, MFU and memory of each step, from the end of the one before, by the device's own clock.

    Args:
        flops: work of a token, from `flops_per_token`.
        peak_flops: FLOP/s of all devices that share the step together; None: MFU is not given.
        device: whose memory is reported; other than CUDA: not given.
    """

    def __init__(self, flops: TokenFlops, peak_flops: float | None, device: torch.device) -> None:
        self._flops, self._peak_flops, self._device = flops, peak_flops, device
        self._since = Moment(device)

    def record(self, tokens: int, trained_tokens: int, ended: Moment) -> dict[str, float | None]:
        """Measures a step that all devices processed `tokens` in. Waits until it has ended.

        Returns:
            tokens_per_second; mfu (0 to 1, or None); gpu_memory_gib (peak allocated so far, or None); seconds.
        """
        seconds, self._since = max(self._since.seconds_until(ended), 1e-9), ended
        mfu = self._peak_flops and self._flops.total(tokens, trained_tokens) / seconds / self._peak_flops
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": mfu,
            "gpu_memory_gib": self._memory_gib(),
            "seconds": seconds,
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (evaluation, a checkpoint) is of no step; all steps before have been recorded."""
        try:
            yield
        finally:
            self._since = Moment(self._device)

    @property
    def peak_memory(self) -> int:
        """Most bytes allocated on the device so far; 0 on other than CUDA."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _memory_gib(self) -> float | None:
        return self.peak_memory / GIB if self._device.type == "cuda" else None
