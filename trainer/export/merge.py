"""Merges an adapter into its base tensor by tensor, in at most twice the memory of the largest file.

The base is the one trained on: for QLoRA its quantised weights dequantised as the training's forward did
(arXiv:2305.14314), or on request the 16-bit ones, which the adapter has never seen.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.appearing import folder_appears_when_complete
from trainer.checkpoint.layout import hash_file, write_manifest
from trainer.checkpoint.result import find_result, training_of
from trainer.errors import PacktrainError, UserError
from trainer.export.base import EMBEDDING, check_unchanged, settings_of_result
from trainer.export.base_stream import BaseStream
from trainer.export.card import write_card
from trainer.export.merge_plan import BaseKind, MergePlan
from trainer.export.pipeline import Buffer, InTurn, Step, run_pipeline
from trainer.export.place import check_apart, check_place
from trainer.export.progress import Progress
from trainer.export.serving import write_serving_files
from trainer.export.shards import Piece, ShardWriter, write_index
from trainer.generate import default_device
from trainer.host_checks import versions
from trainer.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trainer.model.quantized import Fingerprint, format_of
from trainer.model.weights import computing_config
from trainer.prompting import load_prompting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A tensor to write, on the CPU, and the sums of its quantised bytes."""

    tensor: torch.Tensor
    quantized: Fingerprint = field(default_factory=Fingerprint)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        base: what was merged onto; `original` also where the training did not quantise.
        not_trained_on: type that the base was quantised to in training, where it was merged onto in 16 or 32 bits.
        tensors: tensors written. changed: of them, those the adapter makes others of.
        untrained: modules whose adapter is still zero.
        checkpoint: which one the adapter is of, in words; empty where it is a run's final one, or of no run.
        num_bytes: of the safetensors files.
        seconds: wall-clock time.
    """

    out: Path
    base: BaseKind
    not_trained_on: str | None
    tensors: int
    changed: int
    untrained: int
    checkpoint: str
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
        UserError: `out` may not lie there, another process is writing it or the disk has too little room; `source`
            holds no adapter, the base is another one than was trained on, or the adapter does not fit it.
        PacktrainError: the quantised base comes out different from the one trained on.
    """
    started = time.monotonic()
    result = find_result(source)
    check_place(out, result.folder)
    if result.kind == "model":
        raise UserError(
            str(source), f"{result.folder} is a whole model already", "a run with an adapter", "use that model"
        )
    plan = MergePlan(result, base)
    if plan.base.folder:
        check_apart(out, plan.base.folder)
    plan.check()
    merger = Merger(plan, check)
    progress = Progress({**merger.record(), "computed by": [*versions().items(), merger.device.type]})
    with folder_appears_when_complete(out, progress.can_go_on, plan.num_bytes()) as folder:
        progress.clear(folder)
        with ThreadPoolExecutor(1, "configs") as aside:  # reading a tokenizer takes long enough to be worth it
            configs = aside.submit(merger.write_configs, folder)
            merger.write_shards(folder, progress)
            configs.result()
        report = MergeReport(
            out=out,
            base=plan.base_kind,
            not_trained_on=plan.not_trained_on,
            tensors=len(plan.sources),
            changed=plan.num_changed,
            untrained=len(plan.untrained),
            checkpoint=result.checkpoint,
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
    """Carries a plan out: reads the base once, makes each tensor of the merged model, writes and hashes it."""

    def __init__(self, plan: MergePlan, check: Callable[[], None] = lambda: None) -> None:
        self.plan, self.result, self.base, self._look = plan, plan.result, plan.base, check
        self.device = default_device()
        self.content_hash: str | None = None  # of the base, known when all of it has been read
        self.fingerprint = Fingerprint()

    def write_shards(self, folder: Path, progress: Progress) -> None:
        """Writes the safetensors that are not whole yet, and their index.

        Raises:
            UserError: the base is not the one trained on.
            PacktrainError: the quantised base came out different from the one trained on.
        """
        shards, sources = self.plan.shards, self.plan.sources
        ends: dict[str, dict[str, Any]] = {}  # what of the base had been taken in at the end of a file

        def read(piece: Piece, buffer: Buffer) -> torch.Tensor:
            self._look()
            return stream.read(sources[piece.name], buffer)

        def hash_base(piece: Piece, stored: torch.Tensor) -> torch.Tensor:
            stream.hash(piece.file, sources[piece.name], stored)
            if piece.is_last:
                stream.end(piece.file)
            return stored

        def merge(piece: Piece, stored: torch.Tensor) -> Merged:
            return self._merged(piece.name, stored)

        def write(piece: Piece, merged: Merged) -> Merged:
            writer.put(piece, merged.tensor)
            return merged

        def finish(piece: Piece, merged: Merged) -> None:
            self.fingerprint.include(merged.quantized)
            if piece.is_last:
                ends[piece.file] = {"base": stream.hashes[piece.file], "nf4": self.fingerprint.state()}
            writer.finish(piece, merged.tensor)

        def note(file: str, entry: dict[str, Any]) -> None:
            progress.note(folder, file, entry | ends[file])

        with contextlib.closing(BaseStream(self.base, self._look)) as stream:
            self._go_on(folder, progress, stream)
            missing = {file: specs for file, specs in shards.items() if file not in progress.notes}
            with ShardWriter(folder, missing, note) as writer:
                steps: list[Step | InTurn] = [read, InTurn(hash_base), merge, write, InTurn(finish)]
                run_pipeline(writer.pieces(), steps, *self.plan.workers(self.device), self.device)
            self._look()  # a signal that came with the last tensors: this thread was waiting
            self.content_hash = stream.content_hash()
        write_index(folder, shards)
        check_unchanged(self.base, self.content_hash, self.result)
        self._check_fingerprint()

    def write_configs(self, folder: Path) -> None:
        """Writes model config, generation config, tokenizer and chat template."""
        config = self.plan.config
        config.dtype = self.plan.dtype(next(iter(self.plan.sources)))
        config.vocab_size = self.plan.shape(EMBEDDING)[0]
        if self.plan.unties_head:
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
        prompting, settings_of = load_prompting(self.result), settings_of_result(self.result, self.base)
        write_serving_files(folder, settings_of, config, prompting.tokenizer, prompting.template_name)

    def record(self) -> dict[str, Any]:
        """What the manifest says beside the files: enough to verify the merge from its folder alone."""
        config, run_dir = self.result.config, self.result.run_dir
        adapter = self.result.folder.resolve()
        local = Path(self.base.model.path).expanduser()
        model = self.base.model.model_dump(mode="json") | ({"path": str(local.resolve())} if local.exists() else {})
        return {
            **training_of(self.result),
            "kind": "merged",
            "merged_onto": self.plan.base_kind,
            "model": model,
            "seed": self.base.seed,
            "base": {
                **(self.result.base or {}),
                "path": model["path"],
                "content_hash": self.content_hash,
                "config": computing_config(self.base.model),
                "nf4_fingerprint": self.fingerprint.text() if self.plan.quantization else None,
            },
            "quantization": self.plan.quantization
            and config
            and {
                **self.plan.quantization.model_dump(mode="json"),
                "compute_dtype": config.compute_dtype,
            },
            "dtype": str(self.plan.dtype(next(iter(self.plan.sources)))).removeprefix("torch."),
            "adapter": {
                "path": str(adapter),
                "in_run": str(adapter.relative_to(run_dir.path.resolve())) if run_dir else None,
                "files": self._adapter_hashes,
            },
            "recipe": config.model_dump(mode="json") if config else None,
        }

    @cached_property
    def _adapter_hashes(self) -> dict[str, str]:
        return {name: hash_file(self.result.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}

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
            logger.info("going on after %d of %d files", len(progress.notes), len(self.plan.shards))

    def _merged(self, name: str, stored: torch.Tensor) -> Merged:
        """The tensor to write, with the heads that were trained; where it fits it lies where `stored` did.

        Args:
            stored: the base's, on the CPU, to be written over.
        """
        self._look()
        dtype, module, adapter = self.plan.dtype(name), name.removesuffix(".weight"), self.plan.adapter
        if name in adapter.replaced:
            return Merged(adapter.replaced[name].to(dtype).contiguous())
        quantized, pair = Fingerprint(), adapter.low_rank.get(module)
        device = self.device if self.plan.is_computed(name) else stored.device
        weight = stored.to(device).to(dtype)  # as the frozen weights of the training
        if module in self.plan.quantized:
            weight = self._dequantized(weight, quantized)
        if pair:
            weight = pair.merge_into(weight, dtype)
        weight = self.plan.kv_heads.repeat(name, weight.to(dtype))
        if weight.data_ptr() == stored.data_ptr() or (weight.shape, dtype) != (stored.shape, stored.dtype):
            return Merged(weight.cpu().contiguous(), quantized)
        return Merged(stored.copy_(weight), quantized)

    def _dequantized(self, weight: torch.Tensor, sums: Fingerprint) -> torch.Tensor:
        """The weight as the forward saw it, in its compute dtype; `sums` takes its bytes in."""
        config, quantization = self.result.config, self.plan.quantization
        assert config is not None and quantization is not None
        format = format_of(quantization)
        packed, scales = format.quantize(weight)
        sums.add(packed, scales)
        return format.dequantize(packed, scales, getattr(torch, config.compute_dtype))

    def _check_fingerprint(self) -> None:
        """The quantised bytes must be the training's, whichever device made either."""
        trained_on, found = (self.result.base or {}).get("nf4_fingerprint"), self.fingerprint.text()
        if self.plan.quantization and trained_on and trained_on != found:
            raise PacktrainError(
                f"{self.base.model.path}: the quantised base changed: its fingerprint is {found}, and was {trained_on} "
                "in training\n  fix: merge with the versions of packtrain and bitsandbytes of the training, "
                "or --base original"
            )
