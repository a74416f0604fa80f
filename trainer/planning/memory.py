"""How much memory a GPU needs at its fullest moment, and of what. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import RecomputeLevel
from trainer.planning import calibration
from trainer.planning.job import SIZES, Job, Kind, Setting
from trainer.planning.shape import LINEARS

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
    of_levels = {level: tokens * waiting_bytes(job, setting.kind, level) for level in setting.levels.counts}
    # Of what lies in host memory a neighbour's part is on its way.
    most = max(of_levels.values()) if job.config.train.offload_activations else math.inf
    below, first = 0.0, 0
    for level, count in setting.levels.counts.items():
        kept = of_levels[level]
        for layer in (first, first + count - 1):
            gradients_above = gradients * (1 - (layer + 1) / num_layers)
            yield gradients_above, min(most, below + (layer - first) * kept) + whole, in_layer
        below, first = below + count * kept, first + count
    ends = 2 * shape.hidden * job.compute_size * tokens  # the last norm's input and output
    yield 0.0, min(most, below) + ends, _at_loss(job, tokens)


def waiting_bytes(job: Job, kind: Kind, level: RecomputeLevel) -> float:
    """As `saved_bytes`, with gate and up as they wait for a layer's backward: in float8 where the recipe says so."""
    kept = saved_bytes(job, kind, level)
    if job.config.train.keep_in_float8 and level in ("none", "norms"):
        kept -= 2 * (job.shape.intermediate * (job.compute_size - 1) - SIZES["float32"])
    return kept


def offloaded_bytes(job: Job, setting: Setting) -> float:
    """Activations of a micro-batch that lie in host memory: those of all layers but the last."""
    if not job.config.train.offload_activations:
        return 0.0
    tokens = setting.micro_batch * job.config.data.pack_length
    return tokens * sum(waiting_bytes(job, setting.kind, level) for level in setting.levels.of_layers[:-1])


def saved_bytes(job: Job, kind: Kind, level: RecomputeLevel) -> float:
    """Bytes that autograd keeps of a decoder layer (the mean of all) for one token, its input among them."""
    if level == "full":
        return job.shape.hidden * job.compute_size
    float32 = (job.shape.heads + 2) * SIZES["float32"]  # attention's log-sum-exp, and the scales of two norms
    return float32 + (_fused_bytes(job, level) if job.has_fused_layers(kind) else _unfused_bytes(job, level))


def _fused_bytes(job: Job, level: RecomputeLevel) -> float:
    """Of our own layer: inputs and outputs of both norms, queries, keys, values and attention's output, gate, up and
    their product, and a low-rank product for each linear.
    """
    shape = job.shape
    norms, wide = {"none": (4, 3), "norms": (2, 2), "mlp": (2, 0)}[level]
    attention = 2 * shape.query + 2 * shape.mean_key_value
    rank = len(job.adapted) * job.config.adapter.r if job.config.adapter else 0
    return (norms * shape.hidden + attention + wide * shape.intermediate + rank) * job.compute_size


def _unfused_bytes(job: Job, level: RecomputeLevel) -> float:
    """Of transformers' layer: inputs of both norms, attention's four (keys and values repeated for every query), gate
    and up, and the input of each linear that is trained or adapted. `mlp` checkpoints the MLP, `norms` is `none`.
    """
    shape, adapter = job.shape, job.config.adapter
    names = set(job.adapted if adapter else LINEARS)
    elements: float = 2 * shape.hidden + 4 * shape.query
    if level == "mlp":
        names -= {"gate_proj", "up_proj", "down_proj"}
        elements += shape.hidden
    else:
        elements += 2 * shape.intermediate
    linears = {name: shape.linears(shape.mean_key_value)[name] for name in names}
    masks = 0.0
    if adapter and adapter.dropout:  # each linear's own copy, dropped out, and a mask in bytes
        inputs = [rows for rows, _ in linears.values()]
        elements, masks = elements + sum(inputs), sum(inputs)
    else:  # attention's output is counted
        elements += sum(rows for name, rows in _distinct_inputs(linears).items() if name != "attention")
    if adapter:
        elements += adapter.r * len(names)
    if adapter and adapter.dora:  # what base and adapter give is scaled apart
        elements += 2 * sum(columns for _, columns in linears.values())
    return elements * job.compute_size + masks


def _distinct_inputs(linears: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Widths of what `linears` read, by where it comes from: several read the same."""
    sources = {"q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "o_proj": "attention", "down_proj": "product"}
    return {sources.get(name, "second norm"): rows for name, (rows, _) in linears.items()}


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
        casts = job.config.adapter is None and job.trained_size > size and not job.has_fused_layers(kind)
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
    if job.config.adapter and job.config.adapter.dora:
        held += shape.intermediate**2 * size  # PEFT multiplies the low-rank matrices by way of an identity
    return gradients * size * tokens + held


def _at_loss(job: Job, tokens: int) -> float:
    """A chunk of logits, hidden states as if every token were trained, and the gradient of a head that is trained."""
    shape = job.shape
    modules = job.config.adapter.modules_to_save if job.config.adapter else ["lm_head"]
    head = shape.vocab * shape.hidden if "lm_head" in modules else 0
    chunk = min(LOGITS_PER_CHUNK, tokens * shape.vocab) * LOGIT_BYTES
    return chunk + HIDDEN_BYTES * shape.hidden * tokens + (SIZES["float32"] + job.compute_size) * head
