"""What every strategy has to agree with: plain transformers and PEFT in one process, float32, a document at a time.

Nothing of the trainer computes here. Its one-process loader is asked for two things that are no computation: the fresh
adapter, which passes through PEFT's files, and the weights that its 4-bit bytes stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from distributed.runs import Trace, learning_rate
from trainer.config import RunConfig
from trainer.data.sampler import Pack
from trainer.data.types import IGNORE_INDEX
from trainer.model.adapter_files import save_adapter
from trainer.model.load import load_model
from trainer.model.quantized import QuantizedLinear


def train_reference(config: RunConfig, global_batches: Sequence[Sequence[Pack]], folder: Path) -> Trace:
    """Trains one step on each global batch.

    Args:
        folder: for the adapter's files.
    """
    model = build_reference(config, folder).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    trace = Trace()
    for step, packs in enumerate(global_batches):
        documents = [document for pack in packs for document in pack]
        tokens = sum(label != IGNORE_INDEX for _, labels in documents for label in labels)
        trace.losses.append(sum(add_gradient(model, ids, labels, tokens) for ids, labels in documents))
        max_norm = config.optim.max_grad_norm or float("inf")
        trace.grad_norms.append(float(nn.utils.clip_grad_norm_(trained.values(), max_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in trained.items():
        trace.state[f"model.{name}"] = parameter.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            trace.state[f"optim.{name}.{moment}"] = optimizer.state[parameter][moment]
    return trace


def add_gradient(model: nn.Module, ids: list[int], labels: list[int], num_tokens: int) -> float:
    """Adds one document's share of the gradient of the mean loss over `num_tokens`; returns its share of the loss."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    targets = torch.tensor(labels)[1:]
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_tokens
    loss.backward()
    return loss.item()


def build_reference(config: RunConfig, folder: Path) -> nn.Module:
    """The base in float32 (of its rounded weights where they are frozen), the same adapter on it through PEFT."""
    frozen_dtype = getattr(torch, config.model.dtype if config.adapter else "float32")
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=frozen_dtype).float()
    if not config.adapter:
        return base
    ours = load_model(config, torch.device("cpu")).model
    with torch.no_grad():
        for name, module in ours.get_base_model().named_modules():
            if isinstance(module, QuantizedLinear):
                base.get_parameter(name.replace(".base_layer", "") + ".weight").copy_(module.dequantize(torch.float32))
    save_adapter(ours, folder)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)
