"""`packtrain plan`: what a recipe will need, how fast it will be, and what else it would fit. No torch."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from trainer.errors import UserError
from trainer.recipe import load_recipe

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.data.recall import DataFacts
    from trainer.planner import Candidate
    from trainer.planning.hardware import Gpu
    from trainer.planning.job import Job

GIB = 2**30
MILLION = 10**6
ELSEWHERE = ((1, 24), (1, 48), (1, 80), (1, 141), (4, 24), (4, 48), (4, 80), (8, 80), (4, 141), (8, 141))
SHOWN_AS = {"traffic": "memory traffic", "small": "small kernels and launches"}
PARTS = ("weights", "optimizer", "gradients", "gathered", "activations", "working")


@dataclass(frozen=True)
class Report:
    """A plan and what it stands on.

    Attributes:
        hardware: in words, with where it was read.
        candidates: in the planner's order.
        elsewhere: the best on other hardware, as ``(GPUs, GPU, candidate)``.
    """

    job: Job
    hardware: str
    facts: DataFacts | None
    candidates: list[Candidate]
    elsewhere: list[tuple[int, Gpu, Candidate]]

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]


def plan(
    recipe: Path,
    *,
    gpus: Annotated[int | None, Parameter(validator=Number(gte=1, lte=MILLION))] = None,
    gpu_memory: Annotated[float | None, Parameter(validator=Number(gt=0))] = None,
    gpu: str | None = None,
    json: bool = False,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Predict memory and speed of a recipe; choose strategy, micro-batch and recompute; say what else would fit.

    Ends with status 2 where nothing fits.

    Args:
        recipe: a YAML file.
        gpus: number of GPUs; default: those of this host.
        gpu_memory: GiB of each GPU, or the size it is sold as: 24, 40, 48, 80, 141.
        gpu: kind of GPU, such as H100, A100 or "RTX 4090"; default: this host's, else the newest of that size.
        json: print one object.
        overrides: dotted field -> value, laid over the recipe.
    """
    report = build_report(load_recipe(recipe, overrides), gpus, gpu_memory, gpu)
    if json:
        print(jsonlib.dumps(as_json(report), indent=2, allow_nan=False))
    else:
        _print(report)
    if not (chosen := report.chosen).fits:
        from trainer.planner import smaller_weights

        ways = ", ".join(smaller_weights(report.job.config))
        raise UserError(
            "packtrain plan",
            f"nothing fits {report.hardware}: the leanest setting needs {chosen.needed / GIB:.1f} GiB a GPU",
            fix=f"take other hardware of the table, {ways}, or lower data.pack_length",
        )


def build_report(config: RunConfig, gpus: int | None, gpu_memory: float | None, gpu: str | None) -> Report:
    """Everything `packtrain plan` prints.

    Raises:
        UserError: no such GPU; a number of GPUs that the strategy does not take; the model's sizes cannot be read.
    """
    from trainer import planner
    from trainer.data.recall import recall
    from trainer.planning.hardware import find_gpu

    facts = recall(config)
    if gpus is None and config.strategy.kind == "single":
        gpus = 1  # as `packtrain train` does
    chosen, number, source = _find_hardware(gpus, gpu_memory, gpu)
    hardware = f"{number} x {chosen}{source}"
    if not _allows(config, number):
        raise _refused_number(config, gpus, hardware)
    job = _job(config, chosen, number, facts)
    elsewhere = []
    for other_number, size in ELSEWHERE:
        if _allows(config, other_number):
            other = replace(job, gpu=find_gpu(memory=size), num_gpus=other_number)
            elsewhere.append((other_number, other.gpu, planner.plan(other)[0]))
    return Report(job, hardware, facts, planner.plan(job), elsewhere)


def _find_hardware(gpus: int | None, gpu_memory: float | None, name: str | None) -> tuple[Gpu, int, str]:
    from trainer.planning.hardware import find_gpu, read_gpu

    if gpu_memory is not None or name is not None:
        return find_gpu(name, gpu_memory), gpus or 1, ""
    if here := read_gpu(os.environ):
        return here[0], gpus or here[1], " of this host"
    why = ", as no GPU is here and none was named (--gpu A100, or --gpus 4 --gpu-memory 80)"
    return find_gpu(), gpus or 1, why + "; packtrain train rehearses on the CPU here"


def _check_gpu(config: RunConfig, gpu: Gpu) -> None:
    """Refuses what a training on `gpu` would."""
    from trainer.planning.hardware import ADA, GPUS, HOPPER

    wishes = (
        ("train.float8", "true", config.train.float8, ADA),
        ("model.attention", "flash4", config.model.attention == "flash4", HOPPER),
    )
    for field, value, is_asked, least in wishes:
        if is_asked and gpu.capability < least:
            able = ", ".join(known.name for known in GPUS if known.capability >= least)
            raise UserError(field, f"{value} on {gpu.name}", able, "leave it out, or name another --gpu")
    if config.train.float8 and config.compute_dtype != "bfloat16":
        fix = "set model.dtype (or quantization.compute_dtype) to bfloat16, or train.float8 to false"
        raise UserError("train.float8", f"true in {config.compute_dtype}", "bfloat16 on GPUs", fix)


def _job(config: RunConfig, gpu: Gpu, number: int, facts: DataFacts | None) -> Job:
    from trainer.model.folder import read_sizes
    from trainer.planning.job import Job
    from trainer.planning.shape import ModelShape

    _check_gpu(config, gpu)
    try:
        shape = ModelShape.build(read_sizes(config.model))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError("model.path", f"a config.json without a size: {error}", "a Llama-family model") from error
    per_host = config.slurm.gpus_per_node or 8
    job = Job(config, shape, gpu, number, per_host)
    return replace(job, trained_share=facts.trained_share, attended=facts.attended) if facts else job


def _allows(config: RunConfig, number: int) -> bool:
    strategy = config.strategy
    return not (strategy.kind == "single" and number > 1) and not (strategy.shard_size and number % strategy.shard_size)


def _refused_number(config: RunConfig, asked: int | None, hardware: str) -> UserError:
    shards = config.strategy.shard_size
    if asked is None:
        found = f"{shards}, and this plan would be for {hardware}"
        return UserError("strategy.shard_size", found, f"a multiple of {shards} GPUs", f"name them: --gpus {shards}")
    found = f"{asked}, and " + (f"strategy.shard_size is {shards}" if shards else "strategy.kind is single")
    return UserError("--gpus", found, "1 for single, a multiple of shard_size", "name another, or change the recipe")


# --------------------------------------------------------------------------------------------------------------- json


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data; bytes, seconds and tokens. Tokens and hours are None until the data are prepared."""
    from trainer.planning.host import predict_disk, predict_host

    job, chosen, tokens = report.job, report.chosen, _run_tokens(report)
    host, disk = predict_host(job, chosen.setting.kind, chosen.setting), predict_disk(job)
    return {
        "hardware": {"gpus": job.num_gpus, "gpu": job.gpu.name, "memory": job.gpu.memory},
        "fits": chosen.fits,
        "chosen": _candidate_json(chosen),
        "host": {**asdict(host), "peak": host.peak},
        "disk": {**asdict(disk), "total": disk.total},
        "tokens": tokens,
        "hours": None if tokens is None else _hours(report, tokens),
        "candidates": [_candidate_json(candidate) for candidate in report.candidates],
        "elsewhere": [
            {"gpus": number, "gpu": gpu.name, **_candidate_json(candidate)}
            for number, gpu, candidate in report.elsewhere
        ],
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    setting = candidate.setting
    return {
        "strategy": setting.kind,
        "micro_batch": setting.micro_batch,
        "recompute": setting.levels.counts,
        "memory": {**asdict(candidate.memory), "peak": candidate.memory.peak, "needed": candidate.needed},
        "tokens_per_second": candidate.step.tokens_per_second,
        "seconds": candidate.step.parts,
        "fits": candidate.fits,
    }


def _run_tokens(report: Report) -> float | None:
    """Tokens of the whole run, where the data are known or the steps are counted."""
    config, facts = report.job.config, report.facts
    if config.train.max_steps is not None:
        return float(config.train.max_steps * config.packs_per_step * config.data.pack_length)
    return facts.tokens * config.train.epochs if facts else None


def _hours(report: Report, tokens: float) -> float:
    return tokens / (report.chosen.step.tokens_per_second * report.job.num_gpus) / 3600


# --------------------------------------------------------------------------------------------------------------- text


def _print(report: Report) -> None:
    from launch.tables import new_console

    console = new_console()
    config = report.job.config
    count = config.packs_per_step
    packs = f"{count} pack{'s' * (count != 1)} of {config.data.pack_length:,} tokens a step"
    console.print(f"{config.model.path}: {config.method}, {packs}")
    console.print(f"planned for {report.hardware}\n")
    console.print(_facts_table(report))
    console.print("\nGiB of a GPU at its fullest, and what the alternatives would take")
    console.print(_candidates_table(report))
    console.print("\nwhat would fit elsewhere")
    console.print(_elsewhere_table(report))
    console.print("\npredicted; training measures before it takes a setting")


def _facts_table(report: Report) -> Any:
    from launch.tables import as_texts, new_table
    from slurm.status import duration
    from trainer.planning.host import predict_disk, predict_host

    job, chosen = report.job, report.chosen
    host, disk = predict_host(job, chosen.setting.kind, chosen.setting), predict_disk(job)
    rate = chosen.step.tokens_per_second
    tokens = _run_tokens(report)
    whole = f"{duration(3600 * _hours(report, tokens or MILLION))} for {tokens or MILLION:,.0f} tokens"
    table = new_table("", "", has_header=False)
    rows = {
        "strategy": chosen.setting.kind,
        "micro-batch": f"{chosen.setting.micro_batch} pack{'s' * (chosen.setting.micro_batch > 1)}",
        "recompute": str(chosen.setting.levels),
        "matmuls": f"{'float8 of frozen weights, else ' if job.config.train.float8 else ''}{job.config.compute_dtype}",
        "GPU": f"{chosen.memory.peak / GIB:.1f} GiB allocated; with CUDA, buffers and a margin "
        f"{chosen.needed / GIB:.1f} of {job.gpu.memory / GIB:.1f}{'' if chosen.fits else ': does not fit'}",
        "host": f"{host.peak / GIB:.1f} GiB of memory a host",
        "disk": f"{disk.total / GIB:.1f} GiB ({disk.checkpoints / GIB:.1f} of checkpoints)",
        "speed": f"{rate:,.0f} tok/s a GPU, {rate * job.num_gpus:,.0f} in all",
        "time": whole if tokens else f"{whole} (how many the data hold, packtrain preprocess finds out)",
        "goes into": ", ".join(f"{SHOWN_AS.get(name, name)} {share:.0%}" for name, share in _shares(chosen)),
    }
    for row in rows.items():
        table.add_row(*as_texts(row))
    return table


def _shares(candidate: Candidate) -> Iterable[tuple[str, float]]:
    """What a step's time goes into, the largest first."""
    shares = {name: seconds / candidate.step.seconds for name, seconds in candidate.step.parts.items()}
    return sorted(((name, share) for name, share in shares.items() if share > 0.005), key=lambda part: -part[1])


def _candidates_table(report: Report) -> Any:
    from launch.tables import as_texts, new_table

    table = new_table("strategy", "packs", "recompute", *PARTS, "peak", "needed", "tok/s a GPU", "")
    for candidate in _shown(report):
        memory, setting = candidate.memory, candidate.setting
        cells = [f"{getattr(memory, part) / GIB:.1f}" for part in PARTS]
        cells += [f"{memory.peak / GIB:.1f}", f"{candidate.needed / GIB:.1f}"]
        cells += [f"{candidate.step.tokens_per_second:,.0f}", _verdict(candidate, report)]
        table.add_row(*as_texts([setting.kind, str(setting.micro_batch), str(setting.levels), *cells]))
    return table


def _shown(report: Report) -> list[Candidate]:
    """The chosen one, and of each strategy and micro-batch the settings with one level, from fast to lean."""
    uniform = [c for c in report.candidates if len(c.setting.levels.counts) == 1 and c is not report.chosen]
    return [report.chosen, *sorted(uniform, key=lambda c: (c.setting.kind, -c.setting.micro_batch, -c.memory.peak))]


def _verdict(candidate: Candidate, report: Report) -> str:
    chosen = report.chosen
    if candidate is chosen:
        return "chosen" if candidate.fits else "leanest"
    if not candidate.fits:
        return f"{(candidate.needed - candidate.room) / GIB:.1f} GiB too much"
    slower = 1 - candidate.step.tokens_per_second / chosen.step.tokens_per_second
    if slower >= 0.0005:
        return f"{slower:.1%} slower"
    return "as fast, larger" if candidate.needed > chosen.needed else "as fast"


def _elsewhere_table(report: Report) -> Any:
    from launch.tables import as_texts, new_table

    table = new_table("GPUs", "", "strategy", "packs", "recompute", "needed", "tok/s a GPU", "tok/s")
    for number, gpu, candidate in report.elsewhere:
        setting, rate = candidate.setting, candidate.step.tokens_per_second
        gib = f"{candidate.needed / GIB:.1f}"
        cells = ["does not fit", "", "", gib, "", ""]
        if candidate.fits:
            cells = [setting.kind, str(setting.micro_batch), str(setting.levels), gib]
            cells += [f"{rate:,.0f}", f"{rate * number:,.0f}"]
        table.add_row(*as_texts([f"{number} x {gpu.size} GB", gpu.name, *cells]))
    return table
