"""Merges an adapter into its base tensor by tensor, in at most twice the memory of the largest file.

The base is the one trained on: for QLoRA its quantised weights dequantised as the training's forward did
(arXiv:2305.14314), or on request the 16-bit ones, which the adapter has never seen.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.checkpoint.layout import folder_appears_when_complete, hash_file, write_manifest
from trainer.checkpoint.result import Result, find_result, training_of
from trainer.config import ModelConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.adapter import Adapter, read_adapter
from trainer.export.base import EMBEDDING, HEAD, BaseTensors, check_unchanged
from trainer.export.base_stream import BaseStream
from trainer.export.card import write_card
from trainer.export.kv_heads import KVHeads
from trainer.export.pipeline import Buffer, run_pipeline
from trainer.export.progress import Progress
from trainer.export.serving import write_serving_files
from trainer.export.shards import Piece, ShardWriter, Spec, write_index
from trainer.generate import default_device
from trainer.host_checks import versions
from trainer.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trainer.model.decilm import as_llama
from trainer.model.quantized import Fingerprint, format_of
from trainer.model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
BaseKind = Literal["dequantized", "original"]
MOST_BUFFERS = 4  # one being read, one waiting, one being merged, one being written


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        base: what was merged onto; `original` also where the training did not quantise.
        tensors: tensors written. changed: of them, those the adapter touched.
        untrained: modules whose adapter is still zero.
        num_bytes: of the safetensors files.
        seconds: wall-clock time.
    """

    out: Path
    base: BaseKind
    tensors: int
    changed: int
    untrained: int
    num_bytes: int
    seconds: float


def merge_adapter(
    source: Path,
    out: Path,
    base: BaseKind = "dequantized",
    check: Callable[[], None] = lambda: None,
    approve: Callable[[Path], None] = lambda folder: None,
) -> MergeReport:
    """Writes base and adapter as one model: safetensors, configs, tokenizer, template, card and manifest.

    A merge of the same adapter, base and settings that was killed or asked to stop goes on after its last whole file.

    Args:
        source: a run dir, or an adapter folder in PEFT's format.
        out: appears only when complete and approved.
        check: called before each tensor; what it raises ends the merge.
        approve: given the complete folder before it becomes `out`; what it raises keeps it from doing so.

    Raises:
        UserError: `out` exists, `source` holds no adapter, the base is another one than was trained on, or the adapter
            does not fit it.
        PacktrainError: the quantised base comes out different from the one trained on.
    """
    started = time.monotonic()
    if out.exists():
        raise UserError("--out", f"{out} exists", "a folder that does not exist yet", "remove it or name another")
    result = find_result(source)
    if result.kind == "model":
        raise UserError(
            str(source), f"{result.folder} is a whole model already", "a run with an adapter", "use that model"
        )
    merger = Merger(result, base, check)
    merger.check()
    _check_space(out, merger.num_bytes())
    out.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress({**merger.record(), "computed by": [*versions().items(), merger.device.type]})
    with folder_appears_when_complete(out, progress.can_go_on) as folder:
        progress.clear(folder)
        merger.write_shards(folder, progress)
        merger.write_configs(folder)
        report = MergeReport(
            out=out,
            base=merger.base_kind,
            tensors=len(merger.sources),
            changed=sum(map(merger.adapter.changes, merger.sources)),
            untrained=len(merger.untrained()),
            num_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            seconds=round(time.monotonic() - started, 3),
        )
        record = merger.record()
        write_manifest(folder, record, progress.entries())
        write_card(folder, record, result.run_dir, report)
        approve(folder)
        progress.forget(folder)
    return report


class Merger:
    """One merge: where its tensors come from, and what each becomes.

    Attributes:
        sources: tensor to write -> tensor of the base it comes from; they differ only where a tied head becomes one of
            its own.
    """

    def __init__(self, result: Result, base_kind: BaseKind, check: Callable[[], None] = lambda: None) -> None:
        self.result, self.adapter, self._look = result, read_adapter(result.folder), check
        self.base = base_of_result(result, self.adapter)
        self.config = copy.deepcopy(as_llama(self.base.config))
        self.kv_heads = KVHeads.of(self.config.to_dict())
        self.device = default_device()
        config = result.config
        self.content_hash: str | None = None  # of the base, known when all of it has been read
        self.quantization = config.quantization if config and base_kind == "dequantized" else None
        self.base_kind: BaseKind = "dequantized" if self.quantization else "original"
        self.fingerprint = Fingerprint()
        self.sources = {name: name for name in self.base.shapes}
        self.unties_head = _unties_head(self.base, self.adapter)
        if self.unties_head:
            self.sources[HEAD] = EMBEDDING
        elif HEAD not in self.sources:
            self.adapter.replaced.pop(HEAD, None)  # of a tied model whose vocabulary grew: its embeddings once more

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
        if untrained := self.untrained():
            logger.warning(
                "%d of %d adapters are zero, so merging leaves their weights as they are (first: %s)",
                len(untrained),
                len(self.adapter.low_rank),
                untrained[0],
            )

    def untrained(self) -> list[str]:
        """Modules whose adapter would change nothing."""
        return [module for module, pair in self.adapter.low_rank.items() if pair.is_zero]

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

    def write_shards(self, folder: Path, progress: Progress) -> None:
        """Writes the safetensors that are not whole yet, and their index.

        Raises:
            UserError: the base is not the one trained on.
            PacktrainError: the quantised base came out different from the one trained on.
        """
        stream = BaseStream(self.base, self._look)
        self._go_on(folder, progress, stream)
        fingerprints: dict[str, list[int]] = {}

        def read(piece: Piece, buffer: Buffer) -> torch.Tensor:
            tensor = stream.read(piece.file, self.sources[piece.name], buffer)
            if piece.is_last:
                stream.end(piece.file)
            return tensor

        def compute(piece: Piece, stored: torch.Tensor) -> torch.Tensor:
            merged = self._merged(piece.name, stored)
            if piece.is_last:
                fingerprints[piece.file] = self.fingerprint.state()
            return merged

        def note(file: str, entry: dict[str, Any]) -> None:
            progress.note(folder, file, {**entry, "base": stream.hashes[file], "nf4": fingerprints[file]})

        writer = ShardWriter(folder, {f: s for f, s in self.shards.items() if f not in progress.notes}, note)
        run_pipeline(writer.pieces(), read, compute, writer.write, self._num_buffers())
        write_index(folder, self.shards)
        self.content_hash = stream.content_hash()
        check_unchanged(self.base, self.content_hash, self.result)
        self._check_fingerprint()

    def write_configs(self, folder: Path) -> None:
        """Writes model config, generation config, tokenizer and chat template."""
        config = self.config
        config.dtype = self._dtype(next(iter(self.sources)))
        config.vocab_size = self._shape(EMBEDDING)[0]
        if self.unties_head:
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
        tokenizer, template_name = tokenizer_of_result(self.result, self.base)
        write_serving_files(folder, self.base.model, config, tokenizer, template_name)

    def record(self) -> dict[str, Any]:
        """What the manifest says beside the files: enough to verify the merge from its folder alone."""
        config, run_dir = self.result.config, self.result.run_dir
        adapter = self.result.folder.resolve()
        local = Path(self.base.model.path).expanduser()
        model = self.base.model.model_dump(mode="json") | ({"path": str(local.resolve())} if local.exists() else {})
        return {
            **training_of(self.result),
            "kind": "merged",
            "merged_onto": self.base_kind,
            "model": model,
            "seed": self.base.seed,
            "base": {
                **(self.result.base or {}),
                "path": model["path"],
                "content_hash": self.content_hash,
                "nf4_fingerprint": self.fingerprint.text() if self.quantization else None,
            },
            "quantization": self.quantization
            and config
            and {
                **self.quantization.model_dump(mode="json"),
                "compute_dtype": config.compute_dtype,
            },
            "dtype": str(self._dtype(next(iter(self.sources)))).removeprefix("torch."),
            "adapter": {
                "path": str(adapter),
                "in_run": str(adapter.relative_to(run_dir.path.resolve())) if run_dir else None,
                "files": {n: hash_file(self.result.folder / n) for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)},
            },
            "recipe": config.model_dump(mode="json") if config else None,
        }

    def _go_on(self, folder: Path, progress: Progress, stream: BaseStream) -> None:
        """Takes up what an earlier merge noted, if the base still is what it read."""
        for file, note in progress.notes.items():
            stream.skip(file)
            self.fingerprint.restore(note["nf4"])
            if stream.hashes[file] != note["base"]:
                progress.forget(folder)
                stream.begin_again()
                self.fingerprint = Fingerprint()
                return
        if progress.notes:
            logger.info("going on after %d of %d files", len(progress.notes), len(self.shards))

    def _num_buffers(self) -> int:
        """Tensors under way at once, so that all of them together are no more than the largest file."""
        largest = max(spec.nbytes for specs in self.shards.values() for spec in specs.values())
        file = max(sum(spec.nbytes for spec in specs.values()) for specs in self.shards.values())
        return max(1, min(MOST_BUFFERS, file // largest))

    def _spec(self, name: str) -> Spec:
        return Spec(tuple(self.kv_heads.shape(name, self._shape(name))), self._dtype(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        replaced = self.adapter.replaced.get(name)
        return tuple(replaced.shape) if replaced is not None else self.base.shapes[self.sources[name]]

    def _dtype(self, name: str) -> torch.dtype:
        """The run's ``model.dtype``; without a run the dtype the base is saved in."""
        if self.result.config:
            return getattr(torch, self.result.config.model.dtype)
        return self.base.saved_dtype(self.sources[name])

    def _merged(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The tensor to write, on the CPU, with the heads that were trained; where it fits it lies where `stored` did.

        Args:
            stored: the base's, on the CPU, to be written over.
        """
        self._look()
        dtype, module = self._dtype(name), name.removesuffix(".weight")
        if name in self.adapter.replaced:
            return self.adapter.replaced[name].to(dtype).contiguous()
        weight = stored.to(self.device).to(dtype)  # as the frozen weights of the training
        if self.quantization and module in self.base.linears:
            weight = self._dequantized(weight)
        if module in self.adapter.low_rank:
            weight = self.adapter.low_rank[module].merge_into(weight, dtype)
        weight = self.kv_heads.repeat(name, weight.to(dtype))
        if weight.data_ptr() == stored.data_ptr() or (weight.shape, dtype) != (stored.shape, stored.dtype):
            return weight.cpu().contiguous()
        return stored.copy_(weight)

    def _dequantized(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the forward saw it, in its compute dtype."""
        config, quantization = self.result.config, self.quantization
        assert config is not None and quantization is not None
        format = format_of(quantization)
        packed, scales = format.quantize(weight)
        self.fingerprint.add(packed, scales)
        return format.dequantize(packed, scales, getattr(torch, config.compute_dtype))

    def _check_fingerprint(self) -> None:
        """The quantised bytes must be the training's, whichever device made either."""
        trained_on, found = (self.result.base or {}).get("nf4_fingerprint"), self.fingerprint.text()
        if self.quantization and trained_on and trained_on != found:
            raise PacktrainError(
                f"{self.base.model.path}: the quantised base changed: its fingerprint is {found}, and was {trained_on} "
                "in training\n  fix: merge with the versions of packtrain and bitsandbytes of the training, "
                "or --base original"
            )

    def _check_replaced(self, file: str) -> None:
        sizes = set()
        for name, tensor in self.adapter.replaced.items():
            shape = self.base.shapes[self.sources[name]]
            is_vocabulary = self.sources[name] in (EMBEDDING, HEAD)
            if tuple(tensor.shape)[is_vocabulary:] != shape[is_vocabulary:]:  # a vocabulary may have grown
                raise UserError(file, f"{name} of shape {list(tensor.shape)}", f"{list(shape)}, by the base")
        sizes = {self._shape(name)[0] for name in self.sources if name in (EMBEDDING, HEAD)}
        if len(sizes) > 1:
            raise UserError(
                file,
                f"embeddings and head would have {' and '.join(map(str, sorted(sizes)))} rows",
                "one size of vocabulary",
                "save both with the adapter: modules_to_save: [embed_tokens, lm_head]",
            )


def base_of_result(result: Result, adapter: Adapter) -> BaseTensors:
    """The base an adapter belongs to, by its run's recipe or else by its own config.

    Raises:
        UserError: the adapter names none.
    """
    if result.config:
        return BaseTensors(result.config.model, result.config.train.seed)
    path = adapter.config.get("base_model_name_or_path")
    if not path:
        file = str(result.folder / ADAPTER_CONFIG)
        raise UserError(file, "base_model_name_or_path is empty", "the base's folder or hub id")
    return BaseTensors(ModelConfig.model_validate({"path": path, "revision": adapter.config.get("revision")}))


def tokenizer_of_result(result: Result, base: BaseTensors) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer trained with, and the name of the template to export with it."""
    if result.config:
        return load_tokenizer(result.config.model), result.config.data.template
    own = (result.folder / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(result.folder) if own else load_tokenizer(base.model)
    return tokenizer, "tokenizer"


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


def _check_space(out: Path, num_bytes: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError("--out", f"{existing} has {free / 2**30:.1f} GiB free", f"{num_bytes / 2**30:.1f} GiB or more")
