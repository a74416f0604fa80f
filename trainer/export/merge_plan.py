"""What a merge will write, known before a byte of the base is read: which tensors, of which shape, in which files."""

from __future__ import annotations

import copy
import logging
import os
from functools import cached_property
from math import prod
from typing import Literal

import torch

from trainer.checkpoint.result import Result, check_files
from trainer.errors import UserError
from trainer.export.adapter import Adapter, read_adapter
from trainer.export.base import EMBEDDING, HEAD, BaseTensors, base_of_result, check_config
from trainer.export.kv_heads import KVHeads
from trainer.export.shards import Spec
from trainer.model.adapter_files import ADAPTER_WEIGHTS
from trainer.model.decilm import as_llama
from trainer.model.format import CHUNK

logger = logging.getLogger(__name__)
BaseKind = Literal["dequantized", "original"]
MOST_ON_GPU = 8  # tensors at once: enough for its copies and the disk's, and some 10 GiB of the GPU at the 70B shape
BLOCK_ELEMENTS = 2**22  # of a weight that are in float32 at a time on a CPU, or more than are
LEAST_ROOM = 2**25  # bytes for the tensors of a small model, whose largest file is nothing beside the libraries


class MergePlan:
    """Base and adapter beside each other.

    Attributes:
        sources: tensor to write -> tensor of the base it comes from; they differ only where a tied head becomes one of
            its own.
        config: of the merged model; its size of vocabulary is the base's.
        quantization: of the base that is merged onto; None onto the 16-bit one. quantized: the modules it is for.
    """

    def __init__(self, result: Result, base_kind: BaseKind) -> None:
        self.result, self.adapter = result, read_adapter(result.folder, result.adapter_recipe)
        check_files(result)
        self.base = base_of_result(result)
        check_config(self.base.model, result)
        self.config = copy.deepcopy(as_llama(self.base.config))
        self.kv_heads = KVHeads.of(self.config.to_dict())
        config = result.config
        self.quantization = config.quantization if config and base_kind == "dequantized" else None
        self.base_kind: BaseKind = "dequantized" if self.quantization else "original"
        self.quantized = self.base.linears if self.quantization else set[str]()
        self.sources = {name: name for name in self.base.shapes}
        self.unties_head = _unties_head(self.base, self.adapter)
        if self.unties_head:
            self.sources[HEAD] = EMBEDDING
        elif HEAD not in self.sources:
            self.adapter.replaced.pop(HEAD, None)  # of a tied model whose vocabulary grew: its embeddings once more

    @property
    def not_trained_on(self) -> str | None:
        """Type that the base was quantised to in training, where it is not merged onto so; else None."""
        config = self.result.config
        return config.quantization.type if config and config.quantization and not self.quantization else None

    def check(self) -> None:
        """Looks at everything that can be known before the base is read.

        Raises:
            UserError: a key of the adapter finds no tensor of its shape.
        """
        file = str(self.result.folder / ADAPTER_WEIGHTS)
        wanted = [f"{module}.weight" for module in self.adapter.low_rank] + list(self.adapter.replaced)
        if not wanted:
            raise UserError(file, "holds no adapter weights", "LoRA pairs or replaced tensors")
        if homeless := sorted(set(wanted) - set(self.sources)):
            raise UserError(
                file,
                f"{len(homeless)} tensors of the adapter have no place in the base, first {homeless[0]}",
                f"modules of {self.base.model.path}",
                "merge onto the base it was trained on",
            )
        for module, pair in self.adapter.low_rank.items():
            shape = self.base.shapes[self.sources[f"{module}.weight"]]
            if (pair.b.shape[0], pair.a.shape[1]) != shape or pair.a.shape[0] != pair.b.shape[1]:
                found = f"{module}: lora_A {list(pair.a.shape)}, lora_B {list(pair.b.shape)}"
                raise UserError(file, found, f"[r, {shape[1]}] and [{shape[0]}, r], by the base")
        self._check_replaced(file)
        if self.untrained:
            logger.warning(
                "%d of %d adapters are zero, so merging leaves their weights as they are (first: %s)",
                len(self.untrained),
                len(self.adapter.low_rank),
                self.untrained[0],
            )

    @cached_property
    def untrained(self) -> list[str]:
        """Modules whose adapter would change nothing."""
        return [module for module, pair in self.adapter.low_rank.items() if pair.is_zero]

    @property
    def num_changed(self) -> int:
        """Tensors that the adapter makes others of."""
        untrained = {f"{module}.weight" for module in self.untrained} - self.adapter.replaced.keys()
        return sum(map(self.adapter.changes, self.sources.keys() - untrained))

    @cached_property
    def shards(self) -> dict[str, dict[str, Spec]]:
        """The files to write, under the base's names, with their tensors."""
        names = {file: list(held) for file, held in self.base.shards.items()}
        if self.unties_head:
            names[list(names)[-1]].append(HEAD)
        return {file: {name: self._spec(name) for name in held} for file, held in names.items()}

    def num_bytes(self) -> int:
        """Size of the tensors to write."""
        return sum(spec.nbytes for specs in self.shards.values() for spec in specs.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor to write, before heads are repeated."""
        replaced = self.adapter.replaced.get(name)
        return tuple(replaced.shape) if replaced is not None else self.base.shapes[self.sources[name]]

    def dtype(self, name: str) -> torch.dtype:
        """The run's ``model.dtype``; without a run the dtype the base is saved in."""
        if self.result.config:
            return getattr(torch, self.result.config.model.dtype)
        return self.base.saved_dtype(self.sources[name])

    def is_computed(self, name: str) -> bool:
        """Whether a tensor is more than a copy of the base's."""
        module = name.removesuffix(".weight")
        return module in self.quantized or module in self.adapter.low_rank

    def workers(self, device: torch.device) -> tuple[int, int]:
        """How many tensors are under way at once, all in the size of the largest file; and bytes of a buffer."""
        specs = {name: spec for held in self.shards.values() for name, spec in held.items()}
        file = max(sum(spec.nbytes for spec in held.values()) for held in self.shards.values())
        room = max(file, LEAST_ROOM)
        sizes = {name: max(self.base.saved_bytes(self.sources[name]), specs[name].nbytes) for name in specs}
        if device.type == "cuda":
            # Embeddings and head stay on the host, and need not fit: pinning memory takes its time.
            buffer = _pinned_bytes(max((size for name, size in sizes.items() if self.is_computed(name)), default=1))
            return max(1, min(MOST_ON_GPU, (room - 2 * max(sizes.values())) // buffer)), buffer
        each = max(size + self._bytes_beside(name, specs[name]) for name, size in sizes.items())
        return max(1, min(len(os.sched_getaffinity(0)) + 2, room // each)), max(sizes.values())

    def _spec(self, name: str) -> Spec:
        return Spec(tuple(self.kv_heads.shape(name, self.shape(name))), self.dtype(name))

    def _bytes_beside(self, name: str, spec: Spec) -> int:
        """Memory that a CPU needs beside a tensor while it makes it."""
        elements = prod(spec.shape)
        if name.removesuffix(".weight") in self.quantized:
            return 2 * spec.nbytes + 24 * min(elements, CHUNK)
        return 4 * min(elements, BLOCK_ELEMENTS)

    def _check_replaced(self, file: str) -> None:
        sizes = set()
        for name, tensor in self.adapter.replaced.items():
            shape = self.base.shapes[self.sources[name]]
            is_vocabulary = self.sources[name] in (EMBEDDING, HEAD)
            if tuple(tensor.shape)[is_vocabulary:] != shape[is_vocabulary:]:  # a vocabulary may have grown
                raise UserError(file, f"{name} of shape {list(tensor.shape)}", f"{list(shape)}, by the base")
        sizes = {self.shape(name)[0] for name in self.sources if name in (EMBEDDING, HEAD)}
        if len(sizes) > 1:
            raise UserError(
                file,
                f"embeddings and head would have {' and '.join(map(str, sorted(sizes)))} rows",
                "one size of vocabulary",
                "save both with the adapter: modules_to_save: [embed_tokens, lm_head]",
            )


def _unties_head(base: BaseTensors, adapter: Adapter) -> bool:
    """Whether a tied head must become a tensor of its own, because only it or only the embeddings changed."""
    if not base.config.tie_word_embeddings or HEAD in base.shapes:
        return False
    if not adapter.changes(HEAD) and not adapter.changes(EMBEDDING):
        return False
    if adapter.config.get("ensure_weight_tying"):
        return False
    head, embeddings = adapter.replaced.get(HEAD), adapter.replaced.get(EMBEDDING)
    return head is None or embeddings is None or not torch.equal(head, embeddings)


def _pinned_bytes(nbytes: int) -> int:
    """What torch takes of the host's memory for a pinned tensor: the next power of two."""
    return 1 << (nbytes - 1).bit_length()
