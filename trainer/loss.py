"""The training objective: summed cross entropy of the trained tokens, never holding a batch's logits.

The sum is divided by the number of trained tokens of the whole global batch (`Strategy.forward_backward`), so the
gradient does not depend on how the batch is cut into micro-batches and processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.data.types import PackedBatch
from trainer.errors import UserError
from trainer.model.kernels.cross_entropy import cross_entropy_, is_in_place
from trainer.model.layers import with_adapters

# Logits computed at a time: 128 MiB in 16 bit.
LOGITS_PER_CHUNK = 2**26


def chunk_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """Most bytes that logits in `dtype` and their gradient take: while a chunk is made the one before it lies there."""
    own, float32 = dtype.itemsize, torch.float32.itemsize
    if is_in_place(device):
        return 2 * own * LOGITS_PER_CHUNK
    copies = 2 * float32 + (own if dtype != torch.float32 else 0)  # widened, and log-sum-exp's or the gradient
    return max(2 * own, copies) * LOGITS_PER_CHUNK


class LinearCrossEntropy(torch.autograd.Function):
    """Output projection and cross entropy in one node, chunk by chunk over rows.

    The gradient of a chunk is computed while its logits exist, so backward only scales it. Memory is one chunk of
    logits instead of ``rows x vocabulary``. The idea is Liger Kernel's (arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_grad: bool
    ) -> torch.Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grads_hidden: list[torch.Tensor] = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad and ctx.needs_input_grad[1] else None
        projection = weight.to(hidden.dtype)
        rows = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        for hidden_chunk, target_chunk in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = hidden_chunk @ projection.t()
            loss += cross_entropy_(logits, target_chunk, needs_grad).sum()
            if not needs_grad:
                continue
            grads_hidden.append(logits @ projection)
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden_chunk
        ctx.save_for_backward(torch.cat(grads_hidden) if grads_hidden else torch.zeros_like(hidden), grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        # The scale is applied in float32: a float16 gradient divided by the token count would underflow.
        return (grad_hidden.float() * scale).to(grad_hidden.dtype), grad_weight, None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of ``hidden @ weight.T`` against `targets`.

    Args:
        hidden: ``[rows, hidden_size]``; its dtype is the matmul's.
        weight: ``[vocab_size, hidden_size]``.
        targets: ``[rows]`` int64, all of them counted.

    Returns:
        Scalar float32 sum (0 for no rows).
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, targets, needs_grad)


@torch.no_grad()
def score_tokens(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each target, and whether it is the likeliest token; arguments as of `linear_cross_entropy`.

    Returns:
        Losses ``[rows]`` float32, and hits ``[rows]`` bool.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    projection = weight.to(hidden.dtype)
    rows = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    chunks = zip(hidden.split(rows), targets.split(rows), losses.split(rows), hits.split(rows), strict=True)
    for hidden_chunk, target_chunk, losses_chunk, hits_chunk in chunks:
        logits = (hidden_chunk @ projection.t()).float()
        losses_chunk.copy_(logits.logsumexp(dim=-1) - logits.gather(-1, target_chunk.unsqueeze(-1)).squeeze(-1))
        hits_chunk.copy_(logits.argmax(dim=-1) == target_chunk)
    return losses, hits


class PackedCausalLM(nn.Module):
    """The root module that strategies wrap: a packed batch in, its summed loss out.

    Projection and loss run inside this forward, because FSDP2 and ZeRO-3 gather the head's weight only here.

    Args:
        model: a transformers ``...ForCausalLM``, plain or inside a PeftModel.
        compute_dtype: dtype of the matmuls; anything but float32 runs under autocast.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype

    @property
    def causal_lm(self) -> Any:
        """The transformers model, inside a PeftModel or not."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Summed cross entropy of the batch's trained tokens, a float32 scalar."""
        return linear_cross_entropy(*self._predict(batch))

    def score(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """`score_tokens` of the batch's trained tokens; for a model that is whole on this device."""
        return score_tokens(*self._predict(batch))

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """What the head projects, ``[tokens, hidden_size]``."""
        causal_lm = self.causal_lm
        device_type = batch.input_ids.device.type
        with torch.autocast(device_type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            # In the matmuls' dtype whatever the table rests in, or the residual stream's would depend on the strategy.
            embeddings = causal_lm.get_input_embeddings()(batch.input_ids).to(self.compute_dtype)
            # Not by the decoder's own forward: it looks for documents in the positions to make a mask of them, which
            # is not needed here, and waits for the device to see them.
            decoder, hidden = causal_lm.model, embeddings
            shared = {
                "attention_mask": None,
                "position_ids": batch.position_ids,
                "position_embeddings": decoder.rotary_emb(hidden, position_ids=batch.position_ids),
                "cu_seq_lens_q": batch.cu_seqlens,
                "cu_seq_lens_k": batch.cu_seqlens,
                "max_length_q": batch.max_seqlen,
                "max_length_k": batch.max_seqlen,
            }
            for layer, adapters in with_adapters(list(decoder.layers), self.compute_dtype):
                hidden = layer(hidden, **shared, **adapters)
            return decoder.norm(hidden)[0]

    def _predict(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last hidden states before the trained tokens, the head's weight, and those tokens."""
        hidden = self.hidden_states(batch).index_select(0, batch.trained_positions).to(self.compute_dtype)
        targets = batch.labels[0].index_select(0, batch.trained_positions + 1)
        return hidden, head_weight(self.causal_lm), targets


def head_weight(causal_lm: Any) -> torch.Tensor:
    """The output projection ``[vocab_size, hidden_size]`` as trained now.

    Raises:
        UserError: an adapter sits on the head, which the fused loss would skip.
    """
    head = causal_lm.get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise UserError(
            "adapter.targets",
            "lm_head carries a LoRA adapter",
            "linear modules of the decoder layers",
            "take lm_head out of adapter.targets, or train it in full through adapter.modules_to_save: [lm_head]",
        )
    return head.weight
