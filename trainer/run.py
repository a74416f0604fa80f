"""train(config, run_dir): the assembly of a whole run. Read this file first.

recipe -> tokenizer, packs -> model on the device -> strategy -> loop -> adapter or model -> merged, verified model
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.layout import RunDir, hash_file, read_manifest
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.masking import load_template
from trainer.data.prepare import Splits, load_splits, log_report
from trainer.data.recall import DataFacts
from trainer.data.sampler import GlobalBatchSampler
from trainer.errors import Preempted, UserError
from trainer.export.result import export_result, finish_adapter, finish_full
from trainer.generate import answer_samples
from trainer.host_checks import check_hosts, versions
from trainer.isolation import check_isolation
from trainer.launchers import World
from trainer.loop import LoopState, TrainLoop
from trainer.loss import PackedCausalLM
from trainer.metrics.meters import ThroughputMeter, device_peak_flops, flops_per_token, mean_attended_positions
from trainer.metrics.progress import Progress
from trainer.metrics.recorder import Recorder, Silence
from trainer.metrics.trackers import MetricsLog, Trackers, check_trackers
from trainer.model.attention import agree_on_attention, check_attention
from trainer.model.load import BuiltModel, build_model, load_weights
from trainer.model.quantized import fingerprint
from trainer.model.recompute import check_float8, set_computation, set_recompute
from trainer.model.tokenizer import load_tokenizer
from trainer.optim import build_optimizer
from trainer.planner import smaller_weights
from trainer.planning.job import Job
from trainer.preemption import StopRequest
from trainer.preflight import (
    check_bytes,
    check_disk_space,
    check_same_everywhere,
    check_shared,
    checkpoint_bytes,
    result_bytes,
)
from trainer.processes import Processes, start_processes
from trainer.recipe import dump_recipe
from trainer.record import explaining_memory, meeting, recorded, watched
from trainer.resume import check_data, check_identity, check_nobody_trains, check_recipe_unchanged, only_one_trainer
from trainer.schedule import Schedule
from trainer.sizes import Sizes, begin_with, describe_job, open_sizes
from trainer.strategies.base import Strategy
from trainer.strategies.choose import build_strategy, needs_group
from trainer.watch.watchdog import Watchdog

logger = logging.getLogger(__name__)
ALONE = World()


def train(config: RunConfig, run_dir: Path, world: World = ALONE, data: str | None = None) -> None:
    """Trains, exports and verifies; continues where the run dir's newest intact checkpoint left off.

    Everything the user may have got wrong is looked at before the run dir is touched. Every process of the run calls
    this; they train together, and what follows (export) rank 0 does alone.

    Args:
        data: fingerprint that the data have to have; None: any.

    Raises:
        UserError: recipe, data or model cannot be used; the run dir is as it was.
        Preempted: a signal asked to stop; a checkpoint is committed and ``state.json`` says preempted.
        MemoryRanOut: of a GPU among several; ``state.json`` says preempted, and the next start takes less.
        PreflightFailed: the processes' machines cannot do it.
        PacktrainError: the run failed; ``state.json`` says why.
    """
    run = RunDir(run_dir)
    with contextlib.ExitStack() as at_end:
        stop = at_end.enter_context(StopRequest())
        with contextlib.ExitStack() as together:
            with meeting(run, world, stop):
                started = start_processes(world, needs_group(config), config.train.device)
                processes = together.enter_context(started)
            watchdog = together.enter_context(watched(run, processes, stop))
            tokenizer = _train_together(config, run, processes, data, stop, watchdog, at_end)
        if world.rank == 0:
            _free_memory()
            export_result(config, run, tokenizer, stop)


def _train_together(
    config: RunConfig,
    run: RunDir,
    processes: Processes,
    data: str | None,
    stop: StopRequest,
    watchdog: Watchdog,
    at_end: contextlib.ExitStack,
) -> Any:
    """Everything that takes all processes; gives the tokenizer. What is undone at the very end goes onto `at_end`."""
    check_stop = partial(_stop_if_asked_while_loading, run, processes, stop)
    check_hosts(processes, partial(watchdog.mark, 0))
    check_same_everywhere(processes, versions())
    check_trackers(config.tracking)
    check_attention(config.model.attention, config.compute_dtype, processes.device)
    if config.train.float8:
        check_float8(processes.device, config.compute_dtype)
    check_recipe_unchanged(run, config)
    if processes.is_first:
        with watchdog.alone("looking for another trainer of this run"), stop.cut_short():
            check_nobody_trains(run, stop.check)
    with watchdog.alone("preparing the data"), stop.cut_short():  # one process a host does, others wait for its lock
        tokenizer = load_tokenizer(config.model)
        splits = load_splits(config, tokenizer, stop.check)
    check_stop()
    if processes.is_first:
        for name, report in splits.reports.items():
            log_report(name, report)
    check_same_everywhere(processes, {"recipe": dump_recipe(config), "data": splits.fingerprint})
    check_data(splits.fingerprint, data)
    with watchdog.alone("fetching and building the model"):
        built = build_model(config, processes.device)
    set_computation(built.model, config, processes.device)
    check_stop()
    if processes.is_first and not run.steps():
        check_disk_space(run.path, _bytes_to_write(config, built.model))

    num_trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)  # before they are cut
    root = PackedCausalLM(built.model, getattr(torch, config.compute_dtype))
    agree_on_attention(root.causal_lm, processes)
    job = describe_job(config, built.model, processes, DataFacts.build(splits.reports["train"]))
    strategy = build_strategy(config, job, processes, fingerprint if config.quantization else None)
    started = time.perf_counter()
    base = _load(config, built, root, strategy, watchdog, check_stop)
    logger.info("base in place after %.1f s", time.perf_counter() - started)
    watchdog.mark(0, "preparing to train")
    # Its folder may have another name on each host: what is in it counts.
    check_same_everywhere(processes, {"model.path": json.dumps(asdict(replace(base, path="")))})
    identity = {"base": asdict(base), "data": splits.fingerprint, "sources": splits.sources}
    check_identity(run, identity)

    with watchdog.alone("looking for the run dir"):
        check_shared(run, processes)
    if processes.is_first:
        at_end.enter_context(only_one_trainer(run))
    at_end.enter_context(recorded(run, config, processes, watchdog, stop))
    stop.hold_interrupts()
    strategy.prepare(partial(build_optimizer, config.optim))
    check_bytes(strategy, base.nf4_fingerprint, "after the model was prepared")
    watchdog.mark(0, "checking that packed documents do not see each other")
    check_isolation(strategy)
    _fit(config, run, tokenizer, splits, built.model, num_trained, job, strategy, identity, stop, watchdog)
    return tokenizer


def _load(
    config: RunConfig,
    built: BuiltModel,
    root: PackedCausalLM,
    strategy: Strategy,
    watchdog: Watchdog,
    check_stop: Callable[[], None],
) -> Any:
    try:
        strategy.shard(root)
        return load_weights(built, config, strategy.place, strategy.processes, partial(watchdog.mark, 0), check_stop)
    except torch.OutOfMemoryError as error:
        fix = f"{', '.join(smaller_weights(config))}, or choose a smaller model"
        raise UserError("model.path", f"{config.model.path} does not fit this GPU: {error}", fix=fix) from error


def _fit(
    config: RunConfig,
    run: RunDir,
    tokenizer: Any,
    splits: Splits,
    model: nn.Module,
    num_trained: int,
    job: Job,
    strategy: Strategy,
    identity: dict[str, Any],
    stop: StopRequest,
    watchdog: Watchdog,
) -> None:
    processes = strategy.processes
    finish = (
        finish_adapter(config, model, tokenizer) if config.adapter else finish_full(config, model.config, tokenizer)
    )
    identity = identity | {"recipe": hash_file(run.recipe), "world_size": processes.world_size}
    identity["strategy"] = config.strategy.model_dump() | {"kind": strategy.name}
    with watchdog.alone("checking the checkpoints"):  # every byte of the newest
        checkpoints = CheckpointManager(run, config.checkpoint, identity, processes, finish)
        resumed = checkpoints.newest_intact()
        checkpoints.discard_after(resumed or 0)
    _stop_if_asked_while_loading(run, processes, stop)

    sizes = _choose_sizes(config, run, resumed, job, strategy, splits, model, identity)
    sampler = _sampler(config, len(splits.train))
    num_steps = sampler.num_steps
    with watchdog.alone("starting the trackers"):
        recorder = _recorder(config, run, processes, num_steps, resumed or 0)
    with contextlib.closing(recorder), checkpoints, watchdog.telling(), explaining_memory():
        loop = TrainLoop(
            config=config,
            strategy=strategy,
            train_packs=splits.train,
            validation_packs=splits.validation,
            sampler=sampler,
            num_steps=num_steps,
            sizes=sizes,
            schedule=Schedule(config.schedule, config.optim, num_steps),
            checkpoints=checkpoints,
            recorder=recorder,
            meter=_meter(config, splits, model, num_trained, processes),
            answer_samples=_sampler_of_answers(config, tokenizer, model, processes),
            stop=stop,
            watchdog=watchdog,
        )
        if config.adapter:
            checkpoints.reserve(strategy.state_dict())
        _stop_if_asked_while_loading(run, processes, stop)
        if resumed is not None:
            with loop.meter.paused():
                loop.resume(resumed)
        _announce(recorder, config, run, splits, num_trained, resumed, num_steps, sizes, strategy)
        loop.fit()
        check_bytes(strategy, identity["base"]["nf4_fingerprint"], "after training")
        _announce_best(config, checkpoints, recorder, loop.state)
    if processes.is_first:
        run.write_state("running", loop.state.step, "trained; saving the result")


def _stop_if_asked_while_loading(run: RunDir, processes: Processes, stop: StopRequest) -> None:
    (num_asked,) = processes.sum(int(stop.reason is not None))
    if num_asked:
        reason, saved = stop.reason or "a signal to another process", max(run.steps(), default=0)
        kept = f"step {saved} is saved" if saved else "there was nothing to save"
        raise Preempted(f"stopped while loading by {reason}; {kept}, and the same command goes on from there")


def _recorder(config: RunConfig, run: RunDir, processes: Processes, num_steps: int, resumed: int) -> Recorder:
    if not processes.is_first:
        return Silence()
    log = MetricsLog(run)
    log.truncate_after(resumed)
    trackers = Trackers(config, run, resumed)  # may fail, so before the bar that takes the terminal
    return Recorder(log, trackers, Progress(num_steps, resumed, config.train.log_every))


def _sampler(config: RunConfig, num_packs: int) -> GlobalBatchSampler:
    """Over ``train.max_steps`` steps where the recipe says so, however many passes that takes, else its epochs."""
    epochs, max_steps = config.train.epochs, config.train.max_steps
    if max_steps is not None:
        epochs = max_steps * config.packs_per_step / num_packs
    return GlobalBatchSampler(num_packs, config.packs_per_step, epochs, config.train.seed)


def _choose_sizes(
    config: RunConfig,
    run: RunDir,
    resumed: int | None,
    job: Job,
    strategy: Strategy,
    splits: Splits,
    model: nn.Module,
    identity: dict[str, Any],
) -> Sizes:
    """A run resumed by as many processes, laid out alike, keeps the sizes it began with where they are automatic."""
    candidates, ran_out = open_sizes(job, strategy, run)
    set_levels, has_backed_off = partial(set_recompute, model), ran_out and not strategy.can_begin_anew
    if resumed is not None and config.train.micro_batch == "auto":
        manifest = read_manifest(run.step_dir(resumed))
        if all(manifest.get(key) == identity[key] for key in ("world_size", "strategy")):
            return Sizes(begin_with(manifest["progress"], candidates, job), set_levels, has_backed_off)
    sizes = Sizes(candidates, set_levels, has_backed_off)
    if len(candidates) > 1 and strategy.device.type == "cuda":
        sizes.confirm(strategy, splits.train, job.packs_each, config)
    return sizes


def _meter(config: RunConfig, splits: Splits, model: Any, num_trained: int, processes: Processes) -> ThroughputMeter:
    shown = range(min(len(splits.train), 1000))
    attended = mean_attended_positions(len(ids) for index in shown for ids, _ in splits.train[index])
    flops = flops_per_token(model.config, config.method == "full", attended, num_trained if config.adapter else 0)
    peak = device_peak_flops(processes.device)
    return ThroughputMeter(flops, peak and peak * processes.world_size, processes.device)


def _sampler_of_answers(config: RunConfig, tokenizer: Any, model: nn.Module, processes: Processes) -> Any:
    template = load_template(config.data.template, tokenizer)

    def answers() -> list[tuple[str, str]]:
        prompts = config.eval.samples
        if not prompts:
            return []
        together = processes.world_size > 1
        found = answer_samples(model, tokenizer, prompts, template, config.eval.max_new_tokens, together)
        return list(zip(prompts, found, strict=True))

    return answers


def _announce(
    recorder: Recorder,
    config: RunConfig,
    run: RunDir,
    splits: Splits,
    num_trained: int,
    resumed: int | None,
    num_steps: int,
    sizes: Sizes,
    strategy: Strategy,
) -> None:
    packs, report = len(splits.train), splits.reports["train"]
    if resumed is None:
        text = (
            f"{config.method}: {num_trained:,} trained parameters, {packs} pack{'s' * (packs != 1)} of "
            f"{report.rows:,} row{'s' * (report.rows != 1)} "
            f"({report.trained_tokens:,} of {report.tokens:,} tokens trained), {num_steps} step{'s' * (num_steps != 1)}"
        )
        recorder.event(0, "start", text, num_steps=num_steps)
    else:
        before = read_manifest(run.step_dir(resumed))
        saved_by = _on(before["strategy"]["kind"], before["world_size"])
        recorder.event(resumed, "resume", f"resumed at step {resumed} of {num_steps}, saved by {saved_by}")
    on_cpu = strategy.device.type == "cpu"
    world_size = strategy.processes.world_size
    processes = f", {_on(strategy.name, world_size)}" if world_size > 1 else ""
    processes += (" on the CPU, as a rehearsal" if processes else ", on the CPU") if on_cpu else ""
    emulated = "emulated " if on_cpu else ""
    matmuls = f", {emulated}float8 matmuls" if config.train.float8 else ""
    keeps_them = {"none", "norms"}.intersection(sizes.setting.levels.counts)
    kept = ", gate and up kept in float8" if config.train.keep_in_float8 and keeps_them else ""
    kept += ", activations in host memory" if config.train.offload_activations else ""
    predicted = sizes.prediction if strategy.device.type == "cuda" else {}
    recorder.event(resumed or 0, "micro_batch", f"{sizes.setting}{matmuls}{kept}{processes}", **predicted)


def _on(kind: str, world_size: int) -> str:
    return kind if world_size == 1 else f"{kind} on {world_size} processes"


def _announce_best(config: RunConfig, checkpoints: CheckpointManager, recorder: Recorder, state: LoopState) -> None:
    best = checkpoints.best_step() if config.checkpoint.keep_best else None
    if best is not None and best != state.step:
        text = f"best weights taken: step {best}, validation loss {state.best_loss:.4f}"
        recorder.event(state.step, "best_loaded", text)


def _bytes_to_write(config: RunConfig, model: nn.Module) -> int:
    """Checkpoints kept, the best and the one being written; then the result."""
    kept = config.checkpoint.keep + 1 + config.checkpoint.keep_best if config.checkpoint.every_steps else 1
    return kept * checkpoint_bytes(model, config) + result_bytes(model, config)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
