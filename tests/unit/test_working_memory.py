"""What the planner counts in a layer's backward and at the loss against the tensors that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import loss
from trainer.config import RunConfig
from trainer.model import blocks
from trainer.model.folder import read_sizes
from trainer.model.load import load_model
from trainer.model.recompute import decoder_layers, set_recompute
from trainer.planning import memory
from trainer.planning.hardware import find_gpu
from trainer.planning.job import Job, Setting
from trainer.planning.levels import read_levels
from trainer.planning.memory import predict_memory, saved_bytes
from trainer.planning.shape import ModelShape

LAYERS = 2


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still live.

    Attributes:
        peak: most of them after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.count())
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


HIDDEN, VOCAB, ROWS = 64, 500, 40  # ROWS of a chunk
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "full in 16 bit": {"train": {"param_dtype": "bfloat16"}},
    "full, float32 throughout": {"model": {"dtype": "float32"}},
    "frozen head": {"adapter": {"r": 1}},
    "frozen head that is cast": {
        "model": {"dtype": "float32"},
        "adapter": {"r": 1},
        "quantization": {"compute_dtype": "bfloat16"},
    },
    "trained head": {"adapter": {"r": 1, "modules_to_save": ["lm_head"]}},
}


def bytes_at_loss(job: Job, rows: int) -> int:
    """Most that live in forward and backward of the loss, its input among them and its weight not."""
    is_trained = job.config.adapter is None or bool(job.config.adapter.modules_to_save)
    rests_in = job.config.train.param_dtype if is_trained else job.config.model.dtype
    weight = torch.randn(VOCAB, HIDDEN).to(getattr(torch, rests_in)).requires_grad_(is_trained)
    targets, computes_in = torch.zeros(rows, dtype=torch.long), getattr(torch, job.config.compute_dtype)
    with LiveStorages() as live:
        scalar = torch.ones((), dtype=computes_in, requires_grad=True)
        hidden = scalar.expand(rows, HIDDEN).clone()  # which nothing keeps for backward
        summed = loss.linear_cross_entropy(hidden, weight, targets)
        del hidden
        summed.backward()
    return live.peak - (weight.nbytes if weight.dtype == computes_in else 0)  # which the matmul saw a view of


@pytest.mark.parametrize("rows", [ROWS // 4, ROWS, 2 * ROWS, 20 * ROWS, 200 * ROWS])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_at_its_fullest(
    form: str, rows: int, toy_recipe: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the gradient in the place of the logits, as on a GPU."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = {"path": str(tmp_path), "init": "random", "dtype": "bfloat16", **FORMS[form].get("model", {})}
    config = toy_recipe(**{**FORMS[form], "model": model})
    job = Job(config, ModelShape.build(read_sizes(config.model)), find_gpu())
    for module in (loss, memory):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", ROWS * VOCAB)
    monkeypatch.setattr(loss, "cross_entropy_", lambda logits, targets, needs_grad: logits[:, 0].mul_(0).float())
    planned = memory._at_loss(job, rows)
    small = 64 * rows + 1024  # losses, targets, scalars
    # The last chunk's gradient comes when no two chunks lie there any more: the plan leaves that out.
    last_chunk = ROWS * HIDDEN * job.compute_size
    assert planned - last_chunk <= bytes_at_loss(job, rows) <= planned + small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunks_of_logits_where_the_loss_makes_copies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", ROWS * VOCAB)
    with LiveStorages() as live:
        hidden = torch.ones(4 * ROWS, 1, dtype=dtype, requires_grad=True)
        loss.linear_cross_entropy(hidden, torch.ones(VOCAB, 1), torch.zeros(4 * ROWS, dtype=torch.long))
    bound = loss.chunk_bytes(dtype, torch.device("cpu"))
    assert 0.9 * bound < live.peak <= bound + 64 * 4 * ROWS
