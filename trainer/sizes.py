"""Micro-batch and recompute levels of a run: predicted, confirmed by measuring, lowered where both were wrong.

Memory grows linearly with the tokens of a micro-batch (packed attention builds no mask), so two small batches foretell
a large one. Trying the large one instead would end in running out of memory, after which a sharded model, some of
whose processes wait in a collective, cannot go on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.data.sampler import Pack, collate
from trainer.data.types import IGNORE_INDEX, PackedRows
from trainer.errors import UserError
from trainer.model.recompute import has_fused_layers
from trainer.planner import Candidate, needed_bytes
from trainer.planning.hardware import CPU, gpu_at_hand
from trainer.planning.job import Job, Setting
from trainer.planning.levels import LayerLevels
from trainer.planning.shape import ModelShape
from trainer.processes import Processes
from trainer.strategies.base import Strategy

logger = logging.getLogger(__name__)

GIB = 2**30
PROBE_TOKENS = (256, 1024)
TRAINED_IN_PROBE = 128  # tokens, the same in both: the loss works in chunks of a fixed size ...
CHUNK_BYTES = 2**30  # ... whose logits, as float32 and in 16 bit, with their gradient stay below this
BACK_OFF = 0.9  # of the memory that ran out, at most, is what a run goes on with


def describe_job(config: RunConfig, model: nn.Module, processes: Processes) -> Job:
    """What the planner is asked about this run; the same on all processes, whose GPUs may differ in size."""
    gpu = CPU
    if processes.device.type == "cuda":
        properties = torch.cuda.get_device_properties(processes.device)
        gpu = gpu_at_hand(processes.from_first(properties.name), processes.min(properties.total_memory))
    model_config = getattr(model, "config")  # noqa: B009, of a PreTrainedModel or PeftModel
    shape = ModelShape.build(model_config.to_dict())
    fused = has_fused_layers(model)
    return Job(config, shape, gpu, processes.world_size, processes.local_world_size, fused)


class Sizes:
    """What a run trains with now, and what is left to fall back to.

    Args:
        candidates: in the planner's order.
        set_levels: puts levels into the model.

    Attributes:
        setting: the one in force.
    """

    def __init__(self, candidates: list[Candidate], set_levels: Callable[[LayerLevels], None]) -> None:
        self._candidates, self._set_levels = candidates, set_levels
        self._has_backed_off = False
        self._take(candidates[0])

    @property
    def setting(self) -> Setting:
        return self._current.setting

    def confirm(self, strategy: Strategy, packs: PackedRows, packs_each: int, pack_length: int) -> None:
        """Measures candidates on the real model, the fastest first, until one fits on every process.

        Args:
            packs_each: packs of a global batch that one process computes.

        Raises:
            UserError: not even the leanest fits.
        """
        total = strategy.processes.min(torch.cuda.get_device_properties(strategy.device).total_memory)
        strategy.module.train()
        strategy.allocate_optimizer()
        while True:
            setting, predicted = self.setting, self._current.memory.peak
            measured = _measure(strategy, packs, packs_each, setting.micro_batch * pack_length)
            excess = needed_bytes(measured, setting.kind) - total
            text = "%s: predicted %.1f GiB, measured %.1f, of %.0f"
            logger.info(text, setting, *(size / GIB for size in (predicted, measured, total)))
            if excess <= 0:
                return
            if (leaner := self._leaner_than(predicted - excess)) is None:
                raise _too_large(setting, measured, total)
            self._take(leaner)

    def back_off(self, found: float) -> str | None:
        """Takes the fastest candidate that needs clearly less than the one whose memory ran out; once in a run.

        Args:
            found: most bytes that were allocated before it ran out.

        Returns:
            What happened, for the log; None where nothing is left to take.
        """
        failed = self._current
        leaner = self._leaner_than(BACK_OFF * failed.memory.peak)
        if leaner is None or self._has_backed_off:
            return None
        self._has_backed_off = True
        self._take(leaner)
        return (
            f"out of memory with {failed.setting}: predicted {failed.memory.peak / GIB:.1f} GiB, found more than "
            f"{found / GIB:.1f}; goes on with {leaner.setting}"
        )

    def _leaner_than(self, peak: float) -> Candidate | None:
        return next((c for c in self._candidates if c.memory.peak <= min(peak, self._current.memory.peak - 1)), None)

    def _take(self, candidate: Candidate) -> None:
        self._current = candidate
        self._set_levels(candidate.setting.levels)


def _too_large(setting: Setting, measured: float, total: float) -> UserError:
    return UserError(
        "train.micro_batch",
        f"{setting} takes some {measured / GIB:.1f} GiB, and this GPU has {total / GIB:.1f}",
        fix="lower data.pack_length, quantise the base (quantization: {type: nf4}), cut it over more GPUs "
        "(strategy.kind: fsdp2), or take optim.name: adamw_8bit; packtrain plan says what would fit",
    )


def _measure(strategy: Strategy, packs: PackedRows, packs_each: int, tokens: int) -> float:
    """Bytes that a micro-batch of `tokens` tokens will allocate at most on any process, by two smaller ones."""
    small, large = (_peak(strategy, packs, probed, packs_each) for probed in PROBE_TOKENS)
    per_token = (large - small) / (PROBE_TOKENS[1] - PROBE_TOKENS[0])
    return large + per_token * max(0, tokens - PROBE_TOKENS[1]) + CHUNK_BYTES


def _peak(strategy: Strategy, packs: PackedRows, tokens: int, packs_each: int) -> float:
    """Most bytes allocated on any process while `tokens` tokens a micro-batch go forward and backward."""
    device = strategy.device
    batch = collate([_cut(packs, tokens)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    # Two, where a step has two: the second one's activations lie beside the first one's gradients.
    strategy.forward_backward([batch] * min(2, packs_each), batch.num_trained_tokens)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    strategy.discard_gradients()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return strategy.processes.max(peak)


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
