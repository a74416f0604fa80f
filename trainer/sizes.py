"""Micro-batch and recompute levels of a run: predicted, confirmed by measuring, lowered where both were wrong.

Memory grows linearly with the tokens of a micro-batch (packed attention builds no mask), so two smaller ones foretell
a large one. Trying the large one instead would end in running out of memory, after which a sharded model, some of
whose processes wait in a collective, cannot go on.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.config import RunConfig
from trainer.data.recall import DataFacts
from trainer.data.sampler import Pack, collate
from trainer.data.types import IGNORE_INDEX, PackedRows
from trainer.errors import UserError
from trainer.loss import chunk_bytes
from trainer.model.attention import FLASH4
from trainer.model.recompute import has_fused_layers
from trainer.planner import Candidate, needed_bytes, plan, price, smaller_weights
from trainer.planning.hardware import CPU, gpu_at_hand
from trainer.planning.job import Job, Kind, Setting
from trainer.planning.levels import LayerLevels, read_levels
from trainer.planning.shape import ModelShape
from trainer.processes import Processes
from trainer.strategies.base import Strategy

logger = logging.getLogger(__name__)

GIB = 2**30
PROBED = 4  # a micro-batch is foretold by one of so small a share of its tokens, and another as small again
MIN_PROBE = 1024  # tokens of the larger one
TRAINED_IN_PROBE = 128  # tokens, the same in both: the loss works in chunks of a fixed size, which is added
BACK_OFF = 0.9  # of the memory that ran out, at most, is what a run goes on with


def describe_job(config: RunConfig, model: nn.Module, processes: Processes, data: DataFacts | None = None) -> Job:
    """What the planner is asked about this run; the same on all processes, whose GPUs may differ in size."""
    gpu = CPU
    if processes.device.type == "cuda":
        properties = torch.cuda.get_device_properties(processes.device)
        gpu = gpu_at_hand(processes.from_first(properties.name), processes.min(properties.total_memory))
    model_config = getattr(model, "config")  # noqa: B009, of a PreTrainedModel or PeftModel
    shape = ModelShape.build(model_config.to_dict())
    fused, flash4 = has_fused_layers(model), model_config._attn_implementation == FLASH4
    job = Job(config, shape, gpu, processes.world_size, processes.local_world_size, fused, flash4)
    return replace(job, trained_share=data.trained_share, attended=data.attended) if data else job


def open_sizes(job: Job, strategy: Strategy, run: RunDir) -> tuple[list[Candidate], bool]:
    """The planner's candidates for a strategy, less those that need as much as ran out of memory in this run dir.

    Returns:
        Candidates; whether memory ran out before under this strategy, on as many processes.
    """
    kind = cast(Kind, strategy.name)
    candidates = plan(job, [kind])
    failed = strategy.processes.from_first(_read_failure(run) if strategy.processes.is_first else None)
    if failed is None or (failed["strategy"], failed["world_size"]) != (kind, job.num_gpus):
        return candidates, False
    limit = BACK_OFF * price(job, Setting.load(kind, failed)).memory.peak
    leaner = [candidate for candidate in candidates if candidate.memory.peak <= limit]
    if leaner:
        logger.info("memory ran out with %s: takes less", Setting.load(kind, failed))
    return leaner or candidates, True


def begin_with(saved: Mapping[str, Any], candidates: list[Candidate], job: Job) -> list[Candidate]:
    """`candidates` with the sizes of a checkpoint in front, if they are still open.

    Args:
        saved: what `Setting.saved` gave; levels that the recipe names now count more.
    """
    kind, asked = candidates[0].setting.kind, job.config.train.recompute
    setting = Setting.load(kind, saved)
    if asked != "auto":
        setting = replace(setting, levels=read_levels(asked, job.shape.num_layers))
    before = price(job, setting)
    largest = max(candidate.memory.peak for candidate in candidates)
    return [before, *candidates] if before.memory.peak <= largest else candidates


def _read_failure(run: RunDir) -> dict[str, Any] | None:
    try:
        return json.loads(run.out_of_memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Sizes:
    """What a run trains with now, and what is left to fall back to.

    Args:
        candidates: in the planner's order.
        set_levels: puts levels into the model.
        has_backed_off: memory ran out before, and these are the sizes that it left.

    Attributes:
        setting: the one in force.
    """

    def __init__(
        self, candidates: list[Candidate], set_levels: Callable[[LayerLevels], None], has_backed_off: bool = False
    ) -> None:
        self._candidates, self._set_levels = candidates, set_levels
        self._has_backed_off = has_backed_off
        self._paged = 0.0  # bytes of moments that torch does not count, and predictions do
        self._take(candidates[0])

    @property
    def setting(self) -> Setting:
        return self._current.setting

    @property
    def prediction(self) -> dict[str, float]:
        """What the planner says of them: GiB and tokens a second of a GPU."""
        memory, step = self._current.memory, self._current.step
        return {"predicted_gib": memory.peak / GIB, "predicted_tokens_per_second": step.tokens_per_second}

    def confirm(self, strategy: Strategy, packs: PackedRows, packs_each: int, config: RunConfig) -> None:
        """Measures candidates on the real model, the fastest first, until one fits on every process.

        Args:
            packs_each: packs of a global batch that one process computes.

        Raises:
            UserError: not even the leanest fits.
        """
        total = strategy.processes.min(torch.cuda.get_device_properties(strategy.device).total_memory)
        strategy.module.train()
        self._paged = paged = strategy.processes.max(strategy.allocate_optimizer())
        while True:
            setting, predicted = self.setting, self._current.memory.peak
            tokens = setting.micro_batch * config.data.pack_length
            measured = _measure(strategy, packs, tokens, accumulates=packs_each > setting.micro_batch)
            measured += chunk_bytes(getattr(torch, config.compute_dtype), strategy.device)
            needed = needed_bytes(measured + paged, setting.kind)
            text = "%s: predicted %.1f GiB, measured %.1f; with CUDA, buffers and a margin %.1f of %.1f"
            logger.info(text, setting, *(size / GIB for size in (predicted, measured + paged, needed, total)))
            if needed <= total:
                return
            if (leaner := self._leaner_than(predicted - (needed - total))) is None:
                if paged and needed_bytes(measured, setting.kind) <= total:
                    logger.warning("paged moments of %.1f GiB move between host and GPU in each step", paged / GIB)
                    return
                raise _too_large(setting, needed, total, config)
            self._take(leaner)

    def back_off(self, found: float) -> str | None:
        """Takes the fastest candidate that needs clearly less than the one whose memory ran out; once in a run.

        Args:
            found: most bytes that torch had allocated before it ran out.

        Returns:
            What happened, for the log; None where nothing is left to take.
        """
        failed, leaner = self._current, self._next_leaner()
        if leaner is None:
            return None
        self._has_backed_off = True
        self._take(leaner)
        return f"{_misprediction(failed, found + self._paged)}; goes on with {leaner.setting}"

    def note_failure(self, run: RunDir, world_size: int, found: float) -> str | None:
        """Keeps the sizes with which memory ran out, so that the next start stays below them.

        Args:
            found: as in `back_off`.

        Returns:
            What happened, where it is worth starting again at once; None where that is left to the user.
        """
        setting, leaner = self.setting, self._next_leaner()
        failed = {"strategy": setting.kind, "world_size": world_size, **setting.saved}
        write_atomically(run.out_of_memory, json.dumps(failed) + "\n")
        if leaner is None:
            return None
        return f"{_misprediction(self._current, found + self._paged)}; the next start takes {leaner.setting}"

    def _next_leaner(self) -> Candidate | None:
        return None if self._has_backed_off else self._leaner_than(BACK_OFF * self._current.memory.peak)

    def _leaner_than(self, peak: float) -> Candidate | None:
        return next((c for c in self._candidates if c.memory.peak <= min(peak, self._current.memory.peak - 1)), None)

    def _take(self, candidate: Candidate) -> None:
        self._current = candidate
        self._set_levels(candidate.setting.levels)


def _misprediction(failed: Candidate, found: float) -> str:
    predicted = f"predicted {failed.memory.peak / GIB:.1f} GiB, found more than {found / GIB:.1f}"
    return f"out of memory with {failed.setting}: {predicted}"


def _too_large(setting: Setting, needed: float, total: float, config: RunConfig) -> UserError:
    ways = ", ".join(smaller_weights(config))
    return UserError(
        "train.micro_batch",
        f"the leanest setting, a {setting}, takes some {needed / GIB:.1f} GiB with CUDA, buffers and a margin, "
        f"and this GPU has {total / GIB:.1f}",
        fix=f"{ways}, or lower data.pack_length; packtrain plan says what would fit",
    )


def _measure(strategy: Strategy, packs: PackedRows, tokens: int, accumulates: bool) -> float:
    """Bytes that steps of micro-batches of `tokens` tokens, few of them trained, will allocate at most on any process.

    Activations grow with tokens where they lie beside gradients, as a second micro-batch's do. In a step of one
    micro-batch they come first and the gradients take their place.
    """
    large = max(MIN_PROBE, tokens // PROBED)
    small = large // PROBED
    (low, _), (high, gradients) = (_peak(strategy, packs, probed) for probed in (small, large))
    peak = high + (high - low) / (large - small) * max(0, tokens - large)
    return strategy.processes.max(peak if accumulates else max(low, peak - gradients))


def _peak(strategy: Strategy, packs: PackedRows, tokens: int) -> tuple[int, int]:
    """Most bytes allocated while two micro-batches of `tokens` tokens go forward and backward, and those they leave."""
    device = strategy.device
    batch = collate([_cut(packs, tokens)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    strategy.forward_backward([batch] * 2, batch.num_trained_tokens)
    torch.cuda.synchronize(device)
    peak, gradients = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device) - before
    strategy.discard_gradients()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak, gradients


def _cut(packs: PackedRows, tokens: int) -> Pack:
    """Documents of the data, `tokens` tokens in all, of which the first few are trained."""
    documents: Pack = []
    missing = tokens
    for index in itertools.cycle(range(len(packs))):
        for ids, _ in packs[index]:
            taken = ids[:missing]
            missing -= len(taken)
            documents.append((taken, [IGNORE_INDEX] * len(taken)))
            if not missing:
                first = documents[0][0]
                documents[0] = (first, (first[:TRAINED_IN_PROBE] + [IGNORE_INDEX] * len(first))[: len(first)])
                return documents
    raise AssertionError("packs without tokens")
