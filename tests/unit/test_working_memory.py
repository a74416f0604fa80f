"""What the planner counts in a layer's backward against the tensors that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.config import RunConfig
from trainer.model import blocks
from trainer.model.folder import read_sizes
from trainer.model.load import load_model
from trainer.model.recompute import decoder_layers, set_recompute
from trainer.planning.hardware import find_gpu
from trainer.planning.job import Job, Setting
from trainer.planning.levels import read_levels
from trainer.planning.memory import predict_memory, saved_bytes
from trainer.planning.shape import ModelShape

LAYERS = 2


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def count(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def bytes_in_backward(layer: Any, rotary: Any, hidden: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the moment at which gradients of gate and up are about to be written."""
    found = []
    x, rows = torch.randn(1, tokens, hidden, requires_grad=True), torch.tensor([0, tokens])
    tables = rotary(x, torch.arange(tokens)[None])
    with LiveStorages() as live, monkeypatch.context() as patch:
        real = blocks.swiglu_backward
        patch.setattr(blocks, "swiglu_backward", lambda *tensors: (found.append(live.count()), real(*tensors)))
        output = layer(x, position_embeddings=tables, cu_seq_lens_q=rows, max_length_q=tokens)
        torch.autograd.backward(output, torch.ones_like(output))
    (at_fullest,) = found
    tables_seen = sum(table.untyped_storage().nbytes() for table in tables)
    return at_fullest - tables_seen - output.untyped_storage().nbytes()  # which the next layer's input is counted as


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 1}}], ids=["full", "lora"])
@pytest.mark.parametrize("level", ["none", "norms", "mlp"])
def test_the_fullest_moment(
    sections: dict[str, Any], level: Any, toy_recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_recipe(**sections)
    shape = ModelShape.build(read_sizes(config.model))
    model: Any = load_model(config, torch.device("cpu")).model.train()
    set_recompute(model, read_levels(level, LAYERS))
    rotary = (model.get_base_model() if config.adapter else model).model.rotary_emb

    def found(tokens: int) -> int:
        return bytes_in_backward(decoder_layers(model)[1], rotary, shape.hidden, tokens, monkeypatch)

    def planned(packs: int) -> float:
        return predict_memory(job, Setting("single", packs, read_levels(level, LAYERS))).peak

    job, tokens, many = Job(config, shape, find_gpu()), 512, 2**15  # packs, beside which a chunk of logits is small
    for_a_token = (planned(2 * many) - planned(many)) / (many * config.data.pack_length)
    for_a_token -= (LAYERS - 1) * saved_bytes(job, "single", level)  # what the layer below keeps
    # gradients of rank-r products are left out of the plan
    on_a_cpu = 3 * shape.query * 4  # keys and values repeated for every query, and attention's output laid out anew
    assert (found(2 * tokens) - found(tokens)) / tokens == pytest.approx(for_a_token + on_a_cpu, rel=5e-3)
