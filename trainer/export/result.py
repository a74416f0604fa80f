"""The result of a run, taken from a committed checkpoint's files: no GPU gathers anything at the end."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.appearing import folder_appears_when_complete
from trainer.checkpoint.layout import MANIFEST, RunDir, find_damage, read_manifest, write_manifest
from trainer.checkpoint.result import find_result, is_run, merged_onto, training_in
from trainer.checkpoint.saved import SavedCheckpoint
from trainer.config import RunConfig
from trainer.errors import PacktrainError, Preempted
from trainer.export.card import write_card
from trainer.export.consolidate import SERVING, CheckpointModel
from trainer.export.serving import make_serving_files, write_serving_files
from trainer.model.adapter_files import adapter_names, save_adapter
from trainer.model.decilm import as_llama
from trainer.model.folder import base_folder
from trainer.model.weights import load_base_config
from trainer.preemption import StopRequest
from trainer.recipe import load_recipe

logger = logging.getLogger(__name__)
Finish = Callable[[Path, SavedCheckpoint], None]
Check = Callable[[], None]


def finish_adapter(config: RunConfig, model: nn.Module, tokenizer: Any) -> Finish:
    """Adds ``adapter/`` in PEFT's format to a checkpoint, read back from its tensors.

    It is whole: with tokenizer, template, stop tokens and a manifest of its own, which has the recipe and the base's
    identity. Wherever it is copied to, it is merged and asked as it was trained, whatever its base becomes.
    """
    files = make_serving_files(config, load_base_config(config.model), tokenizer)
    names = adapter_names(model)

    def finish(folder: Path, saved: SavedCheckpoint) -> None:
        weights = saved.read_many([f"model.{name}" for name in names.values()])
        save_adapter(model, folder / "adapter", {key: weights[f"model.{name}"] for key, name in names.items()})
        _put(files, folder / "adapter")
        _write_adapter_manifest(folder / "adapter", config, saved.manifest)

    return finish


def finish_full(config: RunConfig, model_config: Any, tokenizer: Any) -> Finish:
    """Adds config, tokenizer and generation settings, so that the checkpoint alone can become a model."""
    own_config = copy.deepcopy(as_llama(model_config))
    own_config.dtype = getattr(torch, config.model.dtype)
    files = make_serving_files(config, own_config, tokenizer)
    files[Path("config.json")] = own_config.to_json_string().encode()

    def finish(folder: Path, saved: SavedCheckpoint) -> None:
        _put(files, folder / SERVING)

    return finish


def export_result(config: RunConfig, run: RunDir, tokenizer: Any, stop: StopRequest) -> None:
    """The adapter or model of a finished training; then, as the recipe asks, merged and verified.

    It comes from the best checkpoint, or the last where none is the best. ``merged/`` appears when it is verified; what
    an earlier start merged from the same adapter is verified alone.

    Raises:
        Preempted: a signal asked to stop; at most a tensor is still written.
    """
    best = run.best_step() if config.checkpoint.keep_best else None
    check = partial(_stop_if_asked, stop, "while writing the result")
    write_result(run, best if best is not None else run.steps()[-1], config, tokenizer, check)
    if config.adapter is None or not config.export.merge:
        return
    from trainer.export.merge import merge_adapter

    def approve(folder: Path) -> None:
        if config.export.verify:
            _verify(run, folder, stop)

    if run.merged.exists():
        if merged_onto(run, run.adapter) == (config.export.base if config.quantization else "original"):
            approve(run.merged)
            return
        logger.info("%s is of another adapter or onto another base: merging anew", run.merged)
        shutil.rmtree(run.merged)
    _stop_if_asked(stop, "before merging")
    run.write_state("running", run.read_state()["step"], "merging")
    check = partial(_stop_if_asked, stop, "while merging")
    merged = merge_adapter(run.path, run.merged, config.export.base, check, approve)
    logger.info("merged into %s: %.2f GiB in %.1f s", run.merged, merged.num_bytes / 2**30, merged.seconds)
    if merged.not_trained_on:
        told = "%s is the adapter on the original base, on which it was not trained: that was the base in %s"
        logger.warning(told, run.merged, merged.not_trained_on)


def _warn_if_not_served(run: RunDir) -> None:
    from trainer.servable import why_only_merged

    if refusal := why_only_merged(find_result(run.adapter)):
        logger.warning("vLLM serves this adapter only merged, by `packtrain merge %s`: %s", run.path, refusal)


def _verify(run: RunDir, folder: Path, stop: StopRequest) -> None:
    from trainer.export.verify import verify_export

    _stop_if_asked(stop, "before verifying")
    run.write_state("running", run.read_state()["step"], "verifying")
    proof = verify_export(folder, partial(_stop_if_asked, stop, "while verifying"))
    logger.info(
        "verified: %d tensors equal an independent merge; logits are off by %.2g%% of the adapter's effect (%s)",
        proof.tensors,
        100 * proof.logit_error,
        proof.computed,
    )
    if proof.validation:
        logger.info("validation loss: %s", proof.validation)


def write_result(run: RunDir, step: int, config: RunConfig, tokenizer: Any, check: Check = lambda: None) -> None:
    """Writes ``adapter/`` or ``model/`` of the run, each with tokenizer, template, stop tokens, hashes and card.

    Args:
        step: of the committed checkpoint to take.
        check: called between tensors; what it raises ends the writing, and what was there stays.

    Raises:
        PacktrainError: the checkpoint is damaged.
    """
    checkpoint = run.step_dir(step)
    # The newest one was hashed when it was written, or when the run was resumed from it.
    if step != run.steps()[-1] and (damage := find_damage(checkpoint, check)):
        raise PacktrainError(
            f"the best checkpoint is damaged: {damage}\n"
            f"  fix: put it back, or delete {run.best} to keep the last weights instead"
        )
    if config.adapter is None:
        model = CheckpointModel(checkpoint)
        with folder_appears_when_complete(run.model, num_bytes=model.num_bytes, replaces=True) as folder:
            model.write(folder, check)
        return
    num_bytes = sum(file.stat().st_size for file in (checkpoint / "adapter").iterdir())
    with folder_appears_when_complete(run.adapter, num_bytes=num_bytes, replaces=True) as folder:
        shutil.copytree(checkpoint / "adapter", folder, dirs_exist_ok=True)
        if not (folder / MANIFEST).exists():  # of a checkpoint by an earlier version: nothing but PEFT's files
            base = load_base_config(config.model)
            write_serving_files(folder, base_folder(config.model), base, tokenizer, config.data.template)
            _write_adapter_manifest(folder, config, read_manifest(checkpoint))
        write_card(folder, read_manifest(folder), run)
    if not config.export.merge:
        _warn_if_not_served(run)


def full_checkpoint(source: Path) -> Path | None:
    """The checkpoint of a full fine-tune that `source` is or has: a run's best, else its newest; None of an adapter."""
    if (source / SERVING).is_dir():
        return source
    if not is_run(source) or load_recipe(RunDir(source).recipe).adapter is not None:
        return None
    run = RunDir(source)
    steps = run.steps()
    if not steps:
        return None
    best = run.best_step()
    return run.step_dir(best if best is not None else steps[-1])


def _put(files: Mapping[Path, bytes], folder: Path) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_adapter_manifest(folder: Path, config: RunConfig, of_checkpoint: dict[str, Any]) -> None:
    record = {"kind": "adapter", "recipe": config.model_dump(mode="json"), **training_in(of_checkpoint)}
    write_manifest(folder, record)


def _stop_if_asked(stop: StopRequest, where: str) -> None:
    if stop.reason:
        raise Preempted(f"trained, and stopped {where} by {stop.reason}; the same command goes on from there")
