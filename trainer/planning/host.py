"""What a run needs beside its GPUs: memory of each host, and room on disk. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planning import calibration
from trainer.planning.job import SIZES, Job, Kind, Setting
from trainer.planning.memory import offloaded_bytes

TENSORS_IN_HAND = 4  # of the base's that a process reads, converts and has ready (`trainer.model.prepare`)
EIGHT_BIT_MOMENTS = 2.1  # bytes of both, as a checkpoint holds them


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the fullest host, by what they are.

    Attributes:
        processes: Python, torch and CUDA in each.
        loading: tensors on their way; gone before training.
        checkpoint: copies of what is being saved.
        offload: what ``strategy.offload`` keeps there.
        activations: of a micro-batch, with ``train.offload_activations``.
    """

    processes: float
    loading: float
    checkpoint: float
    offload: float
    activations: float

    @property
    def peak(self) -> float:
        """Of the two moments, loading and saving, the larger."""
        return self.processes + max(self.loading, self.checkpoint + self.offload + self.activations)


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes.

    Attributes:
        checkpoints: those kept, the best, and the one being written.
        result: adapter or model.
        merged: the merged model.
    """

    checkpoints: float
    result: float
    merged: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.checkpoints + self.result + self.merged


def predict_host(job: Job, kind: Kind, setting: Setting | None = None) -> HostMemory:
    """Of the host with most processes. A process copies what it saves to host memory: all that is not cut.

    Args:
        setting: where sizes are chosen; None: without activations.
    """
    shape, each = job.shape, job.gpus_on_host
    largest = max(shape.vocab, shape.intermediate) * shape.hidden * SIZES[job.config.model.dtype]
    state = job.trained_weights * (job.trained_size + job.moments_size)
    shards = job.num_shards if kind == "fsdp2" else job.num_gpus if kind.startswith("zero") else 1
    on_host = {"none": 0.0, "optimizer": state, "all": state + _base_bytes(job, kind)}[job.config.strategy.offload]
    return HostMemory(
        processes=each * calibration.HOST_PROCESS,
        loading=each * TENSORS_IN_HAND * largest,
        checkpoint=each * state / shards,
        offload=each * on_host / shards,
        activations=each * offloaded_bytes(job, setting) if setting else 0.0,
    )


def predict_disk(job: Job) -> Disk:
    """Checkpoints that are kept at one time, and what the run leaves."""
    config, shape = job.config, job.shape
    checkpoint, size = config.checkpoint, SIZES[config.model.dtype]
    num_kept = checkpoint.keep + 1 + checkpoint.keep_best if checkpoint.every_steps else 1
    weights = job.trained_weights * job.trained_size
    result = weights if config.adapter else shape.weights * size
    merged = shape.weights * size if config.export.merge else 0
    return Disk(num_kept * checkpoint_bytes(job), result, merged)


def checkpoint_bytes(job: Job) -> float:
    """Size of one: trained weights, moments and, for adapters, the PEFT copy beside them."""
    weights = job.trained_weights * job.trained_size
    per_weight = EIGHT_BIT_MOMENTS if job.config.optim.name.endswith("8bit") else job.moments_size
    return weights * (2 if job.config.adapter else 1) + job.trained_weights * per_weight


def _base_bytes(job: Job, kind: Kind) -> float:
    """Of a frozen base; fsdp2 has its ends on the GPUs."""
    ends = 0.0 if kind == "fsdp2" else job.root_bytes
    return job.shape.num_layers * job.layer_bytes + ends if job.config.adapter else 0.0
