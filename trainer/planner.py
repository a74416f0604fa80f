"""The planner: which strategy, micro-batch and recompute levels a run is fastest with on the GPUs at hand. No torch.

Every setting a recipe leaves open is priced by the models of memory and time under `trainer.planning`; the fastest that
fits is chosen, and the others say why not. In training, candidates come in this order and are measured before one is
taken (`trainer.sizes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainer.config import RecomputeLevel, RunConfig
from trainer.planning import calibration
from trainer.planning.host import predict_host
from trainer.planning.job import Job, Kind, Setting
from trainer.planning.levels import LEVELS, LayerLevels, read_levels
from trainer.planning.memory import GpuMemory, predict_memory
from trainer.planning.speed import StepTime, predict_step

# Share of a host's memory that its processes' copies of what is saved may take.
HOST_SHARE = 0.5
MIX_STEPS = 16  # mixes of two levels are tried at so many numbers of layers


@dataclass(frozen=True)
class Candidate:
    """A setting, and what it is predicted to take."""

    setting: Setting
    memory: GpuMemory
    step: StepTime
    room: float  # bytes that the GPU has

    @property
    def needed(self) -> float:
        """Bytes of the GPU, with what torch does not count and a margin for the prediction's error."""
        return needed_bytes(self.memory.peak, self.setting.kind)

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.needed <= self.room


def needed_bytes(peak: float, kind: Kind) -> float:
    """What a GPU must have for `peak` allocated bytes: CUDA's context, buffers of several processes, a margin."""
    communication = 0.0 if kind == "single" else calibration.COMMUNICATION
    return peak * (1 + calibration.MARGIN) + calibration.CONTEXT + communication


def plan(job: Job, kinds: Iterable[Kind] | None = None) -> list[Candidate]:
    """Every setting that the recipe leaves open: those that fit, fastest first, then the others, leanest first.

    Args:
        kinds: strategies to look at; None: those of `open_kinds`.

    Raises:
        UserError: ``train.recompute`` does not fit the model's layers.
    """
    found = [price(job, setting) for kind in kinds or open_kinds(job) for setting in _settings(job, kind)]
    fitting = sorted((c for c in found if c.fits), key=_by_speed)
    return fitting + sorted((c for c in found if not c.fits), key=lambda c: c.needed)


def price(job: Job, setting: Setting) -> Candidate:
    """What `setting` takes."""
    return Candidate(setting, predict_memory(job, setting), predict_step(job, setting), job.gpu.memory)


def open_kinds(job: Job, host_memory: float | None = None) -> tuple[Kind, ...]:
    """The strategies that ``strategy.kind`` leaves open on so many GPUs.

    Args:
        host_memory: bytes of a host, where it is known: replicas that each copy all they save have to fit half of it.
    """
    strategy = job.config.strategy
    if strategy.kind != "auto":
        return (strategy.kind,)
    if strategy.offload == "all" or strategy.shard_size:
        return ("fsdp2",)
    if job.num_gpus == 1:
        return ("single",)
    if not strategy.reshard:
        return ("fsdp2",)
    copies = predict_host(job, "ddp").checkpoint
    return ("fsdp2",) if host_memory is not None and copies > HOST_SHARE * host_memory else ("ddp", "fsdp2")


def choose_kind(job: Job, host_memory: float | None = None) -> Kind:
    """The strategy of the fastest setting that fits; where none does, of the leanest."""
    return plan(job, open_kinds(job, host_memory))[0].setting.kind


def smaller_weights(config: RunConfig) -> list[str]:
    """What a recipe can still do, in words, where its weights and what training keeps of them take too much memory."""
    kind, offload, full = config.strategy.kind, config.strategy.offload, config.adapter is None
    cuts = kind in ("auto", "fsdp2", "zero3")
    has_4_bits = config.quantization is not None and config.quantization.type != "int8"
    keeps_moments = full and config.optim.name == "adamw"
    ways = {
        "train an adapter (adapter: {method: lora})": full,
        "quantise the base (quantization: {type: nf4})": not full and not has_4_bits,
        "take optim.name: adamw_8bit": keeps_moments and offload == "none" and not kind.startswith("zero"),
        "keep weights in host memory (strategy.offload: all)": keeps_moments and offload != "all" and cuts,
        f"cut the model over more GPUs{'' if cuts else ' (strategy.kind: fsdp2)'}": True,
    }
    return [way for way, is_open in ways.items() if is_open]


def micro_batches(job: Job) -> list[int]:
    """Packs of one forward that are worth a look, the most first."""
    asked = job.config.train.micro_batch
    if asked != "auto":
        return [asked]
    most = max(1, min(job.packs_each, job.gpu.max_tokens // job.config.data.pack_length))
    return [most >> shift for shift in range(most.bit_length())]


def _by_speed(candidate: Candidate) -> tuple[float, int, float]:
    """Fastest first; of equals larger matmuls, then the lean one."""
    rate = float(f"{candidate.step.tokens_per_second:.4g}")
    return -rate, -candidate.setting.micro_batch, candidate.needed


def _settings(job: Job, kind: Kind) -> Iterator[Setting]:
    for micro_batch in micro_batches(job):
        for levels in _open_levels(job, kind):
            yield Setting(kind, micro_batch, levels)


def _open_levels(job: Job, kind: Kind) -> list[LayerLevels]:
    """One level for all layers, and mixes of two: the lower layers lean, the others fast.

    Lean ones lie at the bottom, where activations wait longest: so the memory that is left buys the most speed.
    """
    asked, num_layers = job.config.train.recompute, job.shape.num_layers
    if asked != "auto":
        return [read_levels(asked, num_layers)]
    offered: list[RecomputeLevel] = [level for level in LEVELS if level != "norms" or job.has_fused_layers(kind)]
    found = [LayerLevels.build({level: num_layers}) for level in offered]
    numbers = sorted({round(num_layers * step / MIX_STEPS) for step in range(1, MIX_STEPS)} - {0, num_layers})
    for fast, lean in itertools.combinations(offered, 2):
        found += [LayerLevels.build({lean: number, fast: num_layers - number}) for number in numbers]
    return found
