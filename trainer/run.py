"""train(config, run_dir): the assembly of a whole run. Read this file first.

recipe -> tokenizer, packs -> model on the device -> strategy -> loop -> adapter or model -> merged, verified model
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.layout import RunDir, hash_file, read_manifest, write_atomically
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.masking import load_template
from trainer.data.prepare import Splits, load_splits, log_report
from trainer.data.sampler import GlobalBatchSampler
from trainer.errors import PacktrainError, Preempted, UserError
from trainer.export.consolidate import replace_folder, save_model
from trainer.export.serving import tokenizer_as_trained, write_serving_files
from trainer.generate import answer_samples
from trainer.loop import TrainLoop
from trainer.loss import PackedCausalLM
from trainer.metrics.meters import ThroughputMeter, device_peak_flops, flops_per_token, mean_attended_positions
from trainer.metrics.progress import Progress
from trainer.metrics.recorder import Recorder
from trainer.metrics.report import write_report
from trainer.metrics.trackers import MetricsLog, Trackers, check_trackers, read_metrics
from trainer.model.load import ADAPTER_WEIGHTS, LoadedModel, load_model, load_tokenizer, save_adapter, set_recompute
from trainer.optim import build_optimizer
from trainer.preemption import StopRequest
from trainer.preflight import check_disk_space, checkpoint_bytes, result_bytes
from trainer.probe import Choice, choose_micro_batch
from trainer.recipe import dump_recipe
from trainer.resume import check_identity, check_recipe_unchanged, only_one_trainer
from trainer.schedule import Schedule
from trainer.strategies.single import SingleProcess

logger = logging.getLogger(__name__)


def train(config: RunConfig, run_dir: Path) -> None:
    """Trains, exports and verifies; continues where the run dir's newest intact checkpoint left off.

    Everything the user may have got wrong is looked at before the run dir is touched.

    Raises:
        UserError: recipe, data or model cannot be used; the run dir is as it was.
        Preempted: a signal asked to stop; a checkpoint is committed and ``state.json`` says preempted.
        PacktrainError: the run failed; ``state.json`` says why.
    """
    _refuse_several_processes()
    run = RunDir(run_dir)
    check_trackers(config.tracking)
    check_recipe_unchanged(run, config)
    tokenizer = load_tokenizer(config.model)
    splits = load_splits(config, tokenizer)
    for name, report in splits.reports.items():
        log_report(name, report)
    torch.manual_seed(config.train.seed)
    try:
        loaded = load_model(config, _device())
    except torch.OutOfMemoryError as error:
        fix = "quantise the base (quantization: {type: nf4}), train an adapter, or choose a smaller model"
        raise UserError("model.path", f"{config.model.path} does not fit this GPU: {error}", fix=fix) from error
    identity = {"base": asdict(loaded.base), "data": splits.fingerprint}
    check_identity(run, identity)
    if not run.steps():
        check_disk_space(run.path, _bytes_to_write(config, loaded))

    with only_one_trainer(run), StopRequest() as stop, _recorded(run, config):
        _fit(config, run, tokenizer, splits, loaded, identity, stop)
        _save_result(config, run, tokenizer, loaded)
        del loaded
        _free_memory()
        _export(config, run, stop)


def _fit(
    config: RunConfig,
    run: RunDir,
    tokenizer: Any,
    splits: Splits,
    loaded: LoadedModel,
    identity: dict[str, Any],
    stop: StopRequest,
) -> None:
    device = _device()
    strategy = SingleProcess(device, loss_scaling=config.compute_dtype == "float16")
    root = PackedCausalLM(loaded.model, getattr(torch, config.compute_dtype))
    strategy.prepare(root, partial(build_optimizer, config.optim))

    save = partial(save_adapter, loaded.model) if config.adapter else None
    identity = identity | {"recipe": hash_file(run.recipe), "world_size": strategy.world_size}
    checkpoints = CheckpointManager(run, config.checkpoint, identity, save)
    resumed = checkpoints.newest_intact()
    checkpoints.discard_after(resumed or 0)

    choice = _choose_sizes(config, run, resumed, strategy, splits, loaded)
    sampler = _sampler(config, len(splits.train))
    num_steps = sampler.num_steps
    log = MetricsLog(run)
    log.truncate_after(resumed or 0)
    trackers = Trackers(config, run, resumed or 0)  # may fail, so before the bar that takes the terminal
    recorder = Recorder(log, trackers, Progress(num_steps, resumed or 0, config.train.log_every))
    with contextlib.closing(recorder), contextlib.closing(checkpoints):
        loop = TrainLoop(
            config=config,
            strategy=strategy,
            train_packs=splits.train,
            validation_packs=splits.validation,
            sampler=sampler,
            num_steps=num_steps,
            micro_batch=choice.micro_batch,
            recompute=choice.recompute,
            schedule=Schedule(config.schedule, config.optim, num_steps),
            checkpoints=checkpoints,
            recorder=recorder,
            meter=_meter(config, splits, loaded, device),
            answer_samples=_sampler_of_answers(config, tokenizer, loaded),
            stop=stop,
        )
        torch.manual_seed(config.train.seed)
        if resumed is not None:
            with loop.meter.paused():
                loop.resume(resumed)
        _announce(recorder, config, splits, loaded, resumed, num_steps, choice)
        loop.fit()
        run.write_state("running", loop.state.step, "trained; saving the result")


def _sampler(config: RunConfig, num_packs: int) -> GlobalBatchSampler:
    """Over ``train.max_steps`` steps where the recipe says so, however many passes that takes, else its epochs."""
    epochs, max_steps = config.train.epochs, config.train.max_steps
    if max_steps is not None:
        epochs = max_steps * config.packs_per_step / num_packs
    return GlobalBatchSampler(num_packs, config.packs_per_step, epochs, config.train.seed)


def _choose_sizes(
    config: RunConfig, run: RunDir, resumed: int | None, strategy: SingleProcess, splits: Splits, loaded: LoadedModel
) -> Choice:
    """A resumed run keeps the sizes it began with where they are automatic: its numbers stay the same."""
    recompute = partial(set_recompute, loaded.model)
    if resumed is not None and config.train.micro_batch == "auto":
        saved = read_manifest(run.step_dir(resumed))["progress"]
        asked = {"none": False, "full": True}.get(config.train.recompute, saved["recompute"])
        choice = Choice(saved["micro_batch"], asked)
        recompute(choice.recompute)
        return choice
    return choose_micro_batch(
        config.train, strategy, splits.train, config.packs_per_step, config.data.pack_length, recompute
    )


def _meter(config: RunConfig, splits: Splits, loaded: LoadedModel, device: torch.device) -> ThroughputMeter:
    shown = range(min(len(splits.train), 1000))
    attended = mean_attended_positions(len(ids) for index in shown for ids, _ in splits.train[index])
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad) if config.adapter else 0
    flops = flops_per_token(loaded.model.config, config.method == "full", attended, trained)
    return ThroughputMeter(flops, device_peak_flops(device), device)


def _sampler_of_answers(config: RunConfig, tokenizer: Any, loaded: LoadedModel) -> Any:
    template = load_template(config.data.template, tokenizer)

    def answers() -> list[tuple[str, str]]:
        prompts = config.eval.samples
        if not prompts:
            return []
        found = answer_samples(loaded.model, tokenizer, prompts, template, config.eval.max_new_tokens)
        return list(zip(prompts, found, strict=True))

    return answers


def _announce(
    recorder: Recorder,
    config: RunConfig,
    splits: Splits,
    loaded: LoadedModel,
    resumed: int | None,
    num_steps: int,
    choice: Choice,
) -> None:
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    packs, report = len(splits.train), splits.reports["train"]
    if resumed is None:
        text = (
            f"{config.method}: {trained:,} trained parameters, {packs} packs of {report.rows:,} rows "
            f"({report.trained_tokens:,} of {report.tokens:,} tokens trained), {num_steps} steps"
        )
        recorder.event(0, "start", text)
    else:
        recorder.event(resumed, "resume", f"resumed at step {resumed} of {num_steps}")
    recorder.event(resumed or 0, "micro_batch", str(choice))


def _save_result(config: RunConfig, run: RunDir, tokenizer: Any, loaded: LoadedModel) -> None:
    """Writes ``adapter/`` or ``model/``, each with the tokenizer and the template trained with."""

    def write_adapter(folder: Path) -> None:
        save_adapter(loaded.model, folder)
        tokenizer_as_trained(tokenizer, config.data.template).save_pretrained(folder)

    def write_model(folder: Path) -> None:
        weights = dict(loaded.model.named_parameters())
        save_model(loaded.model, weights, getattr(torch, config.model.dtype), folder)
        write_serving_files(folder, config.model, loaded.model.config, tokenizer, config.data.template)

    if config.adapter:
        replace_folder(run.adapter, write_adapter)
    else:
        replace_folder(run.model, write_model)


def _export(config: RunConfig, run: RunDir, stop: StopRequest) -> None:
    """Merges and verifies; what an earlier start merged from the same adapter is verified alone."""
    if not (config.export.merge and config.adapter):
        return
    from trainer.export.merge import merge_adapter
    from trainer.export.verify import verify_export

    if run.merged.exists() and not _is_merge_of_result(config, run):
        logger.info("%s is of another adapter or onto another base: merging anew", run.merged)
        shutil.rmtree(run.merged)
    if not run.merged.exists():
        _stop_if_asked(stop, "merging")
        run.write_state("running", run.read_state()["step"], "merging")
        merged = merge_adapter(run.path, run.merged, config.export.base)
        logger.info("merged into %s: %.2f GiB in %.1f s", run.merged, merged.num_bytes / 2**30, merged.seconds)
    if not config.export.verify:
        return
    _stop_if_asked(stop, "verifying")
    run.write_state("running", run.read_state()["step"], "verifying")
    proof = verify_export(run.merged)
    logger.info(
        "verified: %d tensors equal an independent merge; logits are off by %.2g%% of the adapter's effect (%s)",
        proof.tensors,
        100 * proof.logit_error,
        proof.computed,
    )


def _is_merge_of_result(config: RunConfig, run: RunDir) -> bool:
    """Whether ``merged/`` holds this very adapter, on the base that the recipe asks for now."""
    record = read_manifest(run.merged)
    base = config.export.base if config.quantization else "original"
    merged = record.get("adapter", {}).get("files", {}).get(ADAPTER_WEIGHTS)
    return record.get("merged_onto") == base and merged == hash_file(run.adapter / ADAPTER_WEIGHTS)


def _stop_if_asked(stop: StopRequest, before: str) -> None:
    if stop.reason:
        raise Preempted(f"trained, and stopped before {before} by {stop.reason}; the same command goes on from there")


@contextlib.contextmanager
def _recorded(run: RunDir, config: RunConfig) -> Iterator[None]:
    """From here on the run dir is ours: recipe, log file, and a ``state.json`` that says how it ended."""
    steps = run.steps()
    run.write_state("running", steps[-1] if steps else 0, started=time.time(), pid=os.getpid())
    write_atomically(run.recipe, dump_recipe(config))
    run.logs.mkdir(exist_ok=True)
    handler = logging.FileHandler(run.logs / "rank_0.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
        run.write_state("done", run.read_state()["step"])
        logger.info("done: %s", write_report(run))
    except Preempted as stop:
        run.write_state("preempted", run.steps()[-1], str(stop))
        raise
    except KeyboardInterrupt:
        run.write_state("cancelled", _last_step(run), "Ctrl-C twice")
        raise
    except BaseException as error:
        # To the log file alone: on the terminal whoever catches the error shows it.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, str(error), (), sys.exc_info()))
        with contextlib.suppress(OSError):  # the disk may be full
            run.write_state("failed", _last_step(run), f"{type(error).__name__}: {error}")
        if isinstance(error, OSError):
            fix = "make room or mend the file system; the same command goes on from the last checkpoint"
            raise PacktrainError(f"{run.path}: {error}\n  fix: {fix}") from error
        if isinstance(error, torch.OutOfMemoryError):
            fix = "lower train.micro_batch or set train.recompute: full; then it goes on from the last checkpoint"
            raise PacktrainError(f"the GPU's memory is full: {error}\n  fix: {fix}") from error
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _last_step(run: RunDir) -> int:
    """The last step that was done, saved or not."""
    return max((record["step"] for record in read_metrics(run.metrics) if record["kind"] == "step"), default=0)


def _bytes_to_write(config: RunConfig, loaded: LoadedModel) -> int:
    """Checkpoints kept, the best and the one being written; then the result."""
    kept = config.checkpoint.keep + 1 + config.checkpoint.keep_best if config.checkpoint.every_steps else 1
    written = kept * checkpoint_bytes(loaded.model, config)
    return written + result_bytes(loaded.model, config)


def _refuse_several_processes() -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "WORLD_SIZE",
            f"{os.environ['WORLD_SIZE']} processes were started; each would train the same model on its own",
            "1",
            "start one process: packtrain train RECIPE",
        )


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
