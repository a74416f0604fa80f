"""How much memory a GPU needs at its fullest moment, and of what. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import RecomputeLevel
from trainer.planning import calibration
from trainer.planning.job import SIZES, Job, Kind, Setting

LOGITS_PER_CHUNK = 2**26  # of `trainer.loss`, whose import would take torch's time; a test holds them equal
LOGIT_BYTES = 8  # of a chunk's logits: float32, and in 16 bit with their gradient
HIDDEN_BYTES = 8  # of the last hidden state at a trained token and its gradient, in 16 bit and float32


@dataclass(frozen=True)
class GpuMemory:
    """Bytes allocated at the fullest moment of a step, by what they are.

    Attributes:
        weights: the base and what is trained, as they rest.
        optimizer: moments, and masters where they are copies.
        gradients: accumulated so far.
        gathered: layers that are whole for a while, and buffers to send and receive.
        activations: kept for backward, and those of the layer that is being computed again.
        working: what comes and goes inside a layer or the loss.
    """

    weights: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    working: float

    @property
    def peak(self) -> float:
        """All of it, as torch counts it."""
        return self.weights + self.optimizer + self.gradients + self.gathered + self.activations + self.working


def predict_memory(job: Job, setting: Setting) -> GpuMemory:
    """Of one GPU under `setting`: the larger of two moments, the loss, and the backward of the layer that is worst."""
    kind, tokens = setting.kind, setting.micro_batch * job.config.data.pack_length
    gradients = _gradients(job, kind)
    accumulated = kind == "ddp" or job.packs_each > setting.micro_batch  # ddp's buckets are there from the start
    moments = list(_moments(job, setting, tokens, 0.0 if accumulated else gradients))
    waiting, activations, working = max(moments, key=lambda moment: sum(moment))
    return GpuMemory(
        weights=_weights(job, kind),
        optimizer=_optimizer(job, kind),
        gradients=gradients if accumulated else waiting,
        gathered=_gathered(job, kind),
        activations=activations,
        working=working,
    )


def _moments(job: Job, setting: Setting, tokens: int, gradients: float) -> Iterator[tuple[float, float, float]]:
    """Gradients so far, activations and working memory: at the loss, and in the backward of some layers.

    Where levels follow one another the worst layer is the lowest or the highest of its level: further up more
    activations still wait, further down more gradients are there.
    """
    shape, num_layers = job.shape, job.shape.num_layers
    in_layer, whole = _in_layer(job, tokens), tokens * saved_bytes(job, setting.kind, "none")
    below, first = 0.0, 0
    for level, count in setting.levels.counts.items():
        kept = tokens * saved_bytes(job, setting.kind, level)
        for layer in (first, first + count - 1):
            gradients_above = gradients * (1 - (layer + 1) / num_layers)
            yield gradients_above, below + (layer - first) * kept + whole, in_layer
        below, first = below + count * kept, first + count
    ends = 2 * shape.hidden * job.compute_size * tokens  # the last norm's input and output
    yield 0.0, below + ends, _at_loss(job, tokens)


def saved_bytes(job: Job, kind: Kind, level: RecomputeLevel) -> float:
    """Bytes that autograd keeps of a decoder layer (the mean of all) for one token, its input among them.

    Both norms' inputs and outputs are 4 hidden sizes; queries and the attention's output 2 query widths; gate, up and
    their product 3 intermediate sizes. Float32 beside these: a scale for each norm, a log-sum-exp for each head.
    """
    shape, size, fused = job.shape, job.compute_size, job.has_fused_layers(kind)
    hidden, wide, query = shape.hidden, shape.intermediate, shape.query
    if level == "full":
        return hidden * size
    key_value = shape.mean_key_value if fused else query  # transformers' attention takes as many keys as queries
    attention = 2 * query + 2 * key_value
    if fused:
        norms, mlp = {"none": (4, 3), "norms": (2, 2), "mlp": (2, 0)}[level]
    else:
        norms, mlp = {"none": (4, 3), "norms": (4, 3), "mlp": (4, 0)}[level]
    elements = norms * hidden + attention + mlp * wide
    return elements * size + (shape.heads + 2) * 4 + _adapter_bytes(job, level, fused)


def _adapter_bytes(job: Job, level: RecomputeLevel, fused: bool) -> float:
    """The low-rank products of a layer's linears, and what dropout and DoRA keep beside them, by PEFT's own forward."""
    adapter = job.config.adapter
    if adapter is None:
        return 0.0
    linears = job.shape.linears(job.shape.mean_key_value)
    names = [name for name in job.adapted if level != "mlp" or name[0] in "qkvo"]
    low_rank = len(names) * adapter.r * job.compute_size
    plain = not adapter.dropout and not adapter.dora
    if plain:
        return low_rank
    kept = sum(
        linears[name][0] * (SIZES["float32"] + bool(adapter.dropout)) for name in names
    )  # dropped out, and a mask
    return low_rank + kept + adapter.dora * sum(3 * linears[name][1] * job.compute_size for name in names)


def _weights(job: Job, kind: Kind) -> float:
    if job.config.strategy.offload == "all":
        return 0.0
    shape = job.shape
    size = job.compute_size if kind.startswith("zero") and job.config.adapter is None else job.trained_size
    base = shape.num_layers * job.layer_bytes + job.root_bytes if job.config.adapter else 0.0
    return (base + job.trained_weights * size) / _shards_of_weights(job, kind)


def _shards_of_weights(job: Job, kind: Kind) -> int:
    return job.num_shards if kind == "fsdp2" else job.num_gpus if kind == "zero3" else 1


def _gradients(job: Job, kind: Kind) -> float:
    if job.config.strategy.offload == "all":
        return 0.0
    shards = job.num_shards if kind == "fsdp2" else job.num_gpus if kind in ("zero2", "zero3") else 1
    size = job.compute_size if kind.startswith("zero") else job.trained_size
    return job.trained_weights * size / shards


def _optimizer(job: Job, kind: Kind) -> float:
    if job.config.strategy.offload != "none":
        return 0.0
    shards = job.num_shards if kind == "fsdp2" else job.num_gpus if kind.startswith("zero") else 1
    masters = SIZES["float32"] if kind.startswith("zero") else 0
    return job.trained_weights * (job.moments_size + masters) / shards


def _gathered(job: Job, kind: Kind) -> float:
    shape, size = job.shape, job.compute_size
    several = calibration.ZERO_BUFFERS * job.trained_weights if kind.startswith("zero") else 0.0
    if kind in ("single", "ddp"):  # autocast keeps a 16-bit copy of float32 weights
        casts = job.config.adapter is None and job.trained_size > size
        return float(size * shape.linear_weights) if casts else 0.0
    if _shards_of_weights(job, kind) == 1 and job.config.strategy.offload != "all":
        return several
    layer = job.layer_bytes if job.config.adapter else size * shape.layer_weights
    whole = shape.num_layers if not job.config.strategy.reshard else calibration.GATHERED_LAYERS
    root = (shape.embedding_weights + shape.hidden) * size
    sent = 0.0 if job.config.adapter else (size + 4) * shape.layer_weights  # a layer's gradient
    return several + whole * layer + root + sent


def _in_layer(job: Job, tokens: int) -> float:
    """Gradients of the activations in a layer's backward, and a weight in 16 bit beside its stored form."""
    shape, size = job.shape, job.compute_size
    gradients = max(3 * shape.intermediate, 4 * shape.query) + 2 * shape.hidden
    weight = shape.hidden * shape.intermediate
    held = weight * (size + (0 if job.config.adapter else SIZES["float32"]))  # a trained one's gradient twice
    return gradients * size * tokens + held


def _at_loss(job: Job, tokens: int) -> float:
    """A chunk of logits, hidden states as if every token were trained, and the gradient of a head that is trained."""
    shape = job.shape
    modules = job.config.adapter.modules_to_save if job.config.adapter else ["lm_head"]
    head = shape.vocab * shape.hidden if "lm_head" in modules else 0
    chunk = min(LOGITS_PER_CHUNK, tokens * shape.vocab) * LOGIT_BYTES
    return chunk + HIDDEN_BYTES * shape.hidden * tokens + (SIZES["float32"] + job.compute_size) * head
