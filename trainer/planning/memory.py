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


@dataclass(frozen=True)
class GpuMemory:
    """Bytes allocated at the fullest moment of a step, by what they are.

    Attributes:
        weights: the base and what is trained, as they rest.
        optimizer: moments, and masters where they are copies.
        gradients: accumulated so far.
        gathered: layers that are whole for a while, adapters as they are multiplied, and buffers to send and receive.
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
    accumulated = kind == "ddp" or job.packs_each > setting.micro_batch  # ddp's buckets are there from the start
    gradients = _gradients(job, kind, accumulated)
    moments = list(_moments(job, setting, tokens, 0.0 if accumulated else gradients))
    waiting, activations, working = max(moments, key=lambda moment: sum(moment))
    return GpuMemory(
        weights=_weights(job, kind),
        optimizer=_optimizer(job, kind),
        gradients=gradients if accumulated else waiting,
        gathered=_gathered(job, kind) + job.compute_size * job.shape.num_layers * job.layer_adapter_weights,
        activations=activations,
        working=working,
    )


def _moments(job: Job, setting: Setting, tokens: int, gradients: float) -> Iterator[tuple[float, float, float]]:
    """Gradients so far, activations and working memory: at the loss, and in the backward of some layers.

    Where levels follow one another the worst layer is the lowest or the highest of its level: further up more
    activations still wait, further down more gradients are there.
    """
    kind, num_layers = setting.kind, job.shape.num_layers
    of_levels = {level: tokens * waiting_bytes(job, kind, level) for level in setting.levels.counts}
    # Of what lies in host memory a neighbour's part is on its way.
    most = max(of_levels.values()) if job.config.train.offload_activations else math.inf
    below, first = 0.0, 0
    for level, count in setting.levels.counts.items():
        kept = of_levels[level]
        # Computed again as a whole, a layer keeps all for the moment (`FusedDecoderLayer`).
        again: RecomputeLevel = "none" if level == "full" or not job.has_fused_layers(kind) else level
        whole, in_layer = tokens * saved_bytes(job, kind, again), _in_layer(job, kind, again, tokens)
        if job.config.train.keep_in_float8 and level in ("none", "norms"):  # beside what they are restored to
            whole += 2 * job.shape.intermediate * tokens
        for layer in (first, first + count - 1):
            gradients_above = gradients * (1 - (layer + 1) / num_layers)
            yield gradients_above, min(most, below + (layer - first) * kept) + whole, in_layer
        below, first = below + count * kept, first + count
    last = job.shape.hidden * job.compute_size * tokens  # the last norm's input
    yield 0.0, min(most, below) + last, _at_loss(job, tokens)


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
    """Bytes that autograd keeps of a decoder layer (the mean of all) for one token on a GPU, its input among them.

    Attention keeps keys and values as they are, once for all queries that share them.
    """
    if level == "full":
        return job.shape.hidden * job.compute_size
    log_sum_exp = job.shape.heads * SIZES["float32"]
    return log_sum_exp + (_fused_bytes(job, level) if job.has_fused_layers(kind) else _unfused_bytes(job, level))


def _fused_bytes(job: Job, level: RecomputeLevel) -> float:
    """Of `trainer.model.blocks`: the input of each norm; queries, keys and values in one buffer, and attention's
    output; the rank-r products; gate and up unless they are computed again; the norms' outputs and ``silu(gate) * up``
    where nothing is.
    """
    shape = job.shape
    norms, wide = {"none": (4, 3), "norms": (2, 2), "mlp": (2, 0)}[level]
    attention = 2 * shape.query + 2 * shape.mean_key_value
    rank = len(job.adapted) * job.config.adapter.r if job.config.adapter else 0
    return (norms * shape.hidden + attention + wide * shape.intermediate + rank) * job.compute_size


def _unfused_bytes(job: Job, level: RecomputeLevel) -> float:
    """Of transformers' modules: inputs of both norms and their scales, what attention reads and writes, gate and up,
    and the input of each linear that is trained or adapted. `mlp` checkpoints the MLP, `norms` is `none`.
    """
    shape, adapter = job.shape, job.config.adapter
    names = set(job.adapted if adapter else LINEARS)
    elements: float = 2 * shape.hidden + 2 * shape.query + 2 * shape.mean_key_value
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
    return elements * job.compute_size + masks + 2 * SIZES["float32"]


def _distinct_inputs(linears: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Widths of what `linears` read, by where it comes from: several read the same."""
    sources = {"q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "o_proj": "attention", "down_proj": "product"}
    return {sources.get(name, "second norm"): rows for name, (rows, _) in linears.items()}


def _weights(job: Job, kind: Kind) -> float:
    shape, adapter = job.shape, job.config.adapter
    cut, whole = (shape.num_layers * job.layer_bytes, job.root_bytes) if adapter else (0.0, 0.0)
    if kind != "fsdp2":  # which has frozen ends whole everywhere
        cut, whole = cut + whole, 0.0
    if job.config.strategy.offload == "all":
        return whole
    size = job.compute_size if kind.startswith("zero") and adapter is None else job.trained_size
    return whole + (cut + job.trained_weights * size) / _shards_of_weights(job, kind)


def _shards_of_weights(job: Job, kind: Kind) -> int:
    return job.num_shards if kind == "fsdp2" else job.num_gpus if kind == "zero3" else 1


def _gradients(job: Job, kind: Kind, accumulated: bool) -> float:
    if kind == "fsdp2" and job.config.adapter:  # whole until a step's last backward; earlier ones added up in float32
        return job.trained_weights * (job.compute_size + (SIZES["float32"] if accumulated else 0))
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
    if kind == "fsdp2" and job.config.adapter:
        whole = shape.num_layers if not job.config.strategy.reshard else calibration.FROZEN_LAYERS
        return whole * job.layer_bytes + size * job.trained_weights
    layer = job.layer_bytes if job.config.adapter else size * shape.layer_weights
    whole = shape.num_layers if not job.config.strategy.reshard else calibration.GATHERED_LAYERS
    root = (shape.embedding_weights + shape.hidden) * size
    sent = 0.0 if job.config.adapter else (size + 4) * shape.layer_weights  # a layer's gradient
    return several + whole * layer + root + sent


def _in_layer(job: Job, kind: Kind, level: RecomputeLevel, tokens: int) -> float:
    """What a layer's backward holds beside what is kept, at its fullest moment, which is in the MLP."""
    if job.has_fused_layers(kind):
        return max(_in_feed_forward(job, level, tokens)) + _weight_gradients(job)
    shape, size = job.shape, job.compute_size
    gradients = max(3 * shape.intermediate, 4 * shape.query) + 2 * shape.hidden
    weight = shape.hidden * shape.intermediate
    held = weight * (size + (0 if job.config.adapter else SIZES["float32"]))  # a trained one's gradient twice
    if job.config.adapter and job.config.adapter.dora:
        held += shape.intermediate**2 * size  # PEFT multiplies the low-rank matrices by way of an identity
    return gradients * size * tokens + held


def _in_feed_forward(job: Job, level: RecomputeLevel, tokens: int) -> tuple[float, ...]:
    """Bytes of three moments in the backward of `trainer.model.blocks.FeedForward`: the gradient of ``silu(gate) * up``
    is multiplied out; it lies beside those of gate and up; and these are multiplied by their weights.

    A weight is there as it is multiplied, those that share an input one below the other.
    """
    shape, size = job.shape, job.compute_size
    hidden, wide, matrix = shape.hidden, shape.intermediate, shape.hidden * shape.intermediate
    norm, both, product = {"none": (0, 0, 0), "norms": (hidden, 0, wide), "mlp": (hidden, 2 * wide, wide)}[level]
    moments = (
        (norm + both + product + 2 * hidden + wide, hidden, matrix),
        (norm + both + hidden + 3 * wide, 0, 0),
        (norm + 2 * hidden + 2 * wide, 2 * wide, 2 * matrix),
    )
    if job.config.train.float8:  # gradients and weights of a byte each
        return tuple((rows * size + grads) * tokens + weights for rows, grads, weights in moments)
    return tuple(rows * size * tokens + weights * size for rows, _, weights in moments)


def _weight_gradients(job: Job) -> float:
    """Of a trained MLP's three matrices, before they are added to those of earlier micro-batches."""
    if job.config.adapter:
        return 0.0
    own = job.compute_size if job.trained_size != job.compute_size else 0  # computed in 16 bit, then widened
    return job.shape.hidden * job.shape.intermediate * (3 * job.trained_size + own)


def _at_loss(job: Job, tokens: int) -> float:
    """The fullest of five moments of `trainer.loss`, as if every token were trained, with the kernel that writes the
    gradient in the place of the logits.

    In forward a chunk of logits is made while the one before it still lies there; a trained head's gradient of a chunk
    is about to be added to the others; the hidden states' gradients, a chunk each, are laid together. In backward a
    trained head's gradient is scaled in float32, then the hidden states'.
    """
    shape, size, float32 = job.shape, job.compute_size, SIZES["float32"]
    modules = job.config.adapter.modules_to_save if job.config.adapter else ["lm_head"]
    is_trained = "lm_head" in modules
    projection = shape.vocab * shape.hidden
    head = projection if is_trained else 0
    rests_in = job.config.train.param_dtype if is_trained else job.config.model.dtype
    cast = size * projection if rests_in != job.config.compute_dtype else 0
    hidden = size * shape.hidden * tokens
    first = min(LOGITS_PER_CHUNK, tokens * shape.vocab)
    second = min(LOGITS_PER_CHUNK, tokens * shape.vocab - first)
    forward = max(size * (first + second) + 2 * hidden, size * (first + head) + 2 * hidden, size * first + 3 * hidden)
    of_head = 2 * float32 + (job.trained_size if job.trained_size != float32 else 0)
    of_hidden = (2 if size != float32 else 1) * float32 * shape.hidden * tokens
    backward = max(of_head * head + hidden, (float32 + job.trained_size) * head + hidden + of_hidden)
    return max(forward + cast + float32 * head, backward)
