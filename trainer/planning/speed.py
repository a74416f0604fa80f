"""How long a step takes on each GPU, and what of. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import RecomputeLevel
from trainer.planning import calibration
from trainer.planning.job import Job, Kind, Setting
from trainer.planning.memory import offloaded_bytes, saved_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go into, and the tokens that a GPU does in them.

    Attributes:
        matmuls: of forward and backward, attention's among them.
        traffic: memory read and written beside them: norms, activation, rotary embedding, rank-r products, float8.
        recompute: all that is done a second time.
        dequantize: of a quantised base, or copying one beside its adapters, both ways.
        communication: gathers, gradients and activations' way to the host and back that no computation hides, and
            processes waiting for one another.
        optimizer: reading and writing weights, gradients and moments.
        small: what takes its time whatever the tokens: kernels on adapters' matrices, launches, checkpoints.
        tokens: real ones, those of a pack that is there to fill a rank's turn left out.
    """

    matmuls: float
    traffic: float
    recompute: float
    dequantize: float
    communication: float
    optimizer: float
    small: float
    tokens: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: seconds for name, seconds in vars(self).items() if name != "tokens"}

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Layer:
    """Seconds that one layer, the mean of all, takes for one micro-batch on one GPU."""

    matmuls: float
    traffic: float
    dequantize: float  # one pass
    mlp_matmuls: float  # forward of gate and up
    norms_traffic: float  # both norms and the activation, forward


def predict_step(job: Job, setting: Setting) -> StepTime:
    """Of one optimizer step under `setting`."""
    shape, config, kind = job.shape, job.config, setting.kind
    rounds = -(-job.packs_each // setting.micro_batch)
    tokens = min(setting.micro_batch, job.packs_each) * config.data.pack_length
    layer = _layer(job, kind, tokens)
    fused = job.has_fused_layers(kind)
    counts = setting.levels.counts
    again = sum(count * _again(job, layer, level, fused) for level, count in counts.items())
    head = (6 if config.adapter is None else 4) * shape.vocab * shape.hidden * job.trained_share * tokens
    matmuls = shape.num_layers * layer.matmuls + head / _flops(job)
    traffic = shape.num_layers * layer.traffic
    dequantize = 2 * shape.num_layers * layer.dequantize
    small = shape.num_layers * calibration.LAYER_SECONDS
    computing = matmuls + traffic + dequantize + again + small
    exposed = rounds * _exposed_gathers(job, kind, computing) + _exposed_gradients(job, kind, computing)
    exposed += rounds * _exposed_activations(job, setting, computing)
    step = rounds * computing + exposed
    return StepTime(
        matmuls=rounds * matmuls,
        traffic=rounds * traffic,
        recompute=rounds * again,
        dequantize=rounds * dequantize,
        communication=exposed + step * _waiting(job, kind),
        optimizer=_optimizer(job, kind),
        small=rounds * small,
        tokens=config.packs_per_step * config.data.pack_length / job.num_gpus,
    )


def _flops(job: Job) -> float:
    return job.gpu.flops * calibration.MATMUL_SHARE


def _base_flops(job: Job) -> float:
    """FLOP/s of the layers' own matrices."""
    return 2 * job.gpu.flops * calibration.FLOAT8_SHARE if job.config.train.float8 else _flops(job)


def _bandwidth(job: Job) -> float:
    return job.gpu.bandwidth * calibration.BANDWIDTH_SHARE


def _layer(job: Job, kind: Kind, tokens: int) -> _Layer:
    shape, config, fused = job.shape, job.config, job.has_fused_layers(kind)
    weights, size = shape.layer_weights, job.compute_size
    attended = min(job.attended, config.data.pack_length / 2)
    base = (6 if config.adapter is None else 4) * weights / _base_flops(job)
    beside = 6 * job.layer_adapter_weights / _flops(job)
    beside += 3 * 4 * shape.query * attended / (job.gpu.flops * job.attention_share)
    passes = calibration.FUSED_PASSES if fused else calibration.UNFUSED_PASSES
    moved = passes * saved_bytes(job, kind, "none") + (_float8_bytes(job) if config.train.float8 else 0.0)
    is_written = config.quantization or (config.adapter and fused)  # the base, for each matmul
    as_multiplied, looks = 1 if config.train.float8 else size, 1
    if config.train.float8 and not config.quantization:
        looks = 2  # for the largest of each row first
    dequantize = weights * (looks * job.linear_size + as_multiplied) / _bandwidth(job) if is_written else 0.0
    return _Layer(
        matmuls=(base + beside) * tokens,
        traffic=moved * tokens / _bandwidth(job),
        dequantize=dequantize,
        mlp_matmuls=4 * shape.hidden * shape.intermediate * tokens / _base_flops(job),
        norms_traffic=(4 * shape.hidden + 3 * shape.intermediate) * size * tokens / _bandwidth(job),
    )


def _float8_bytes(job: Job) -> float:
    """Moved for one token of a layer around matmuls in float8: what is multiplied is read twice and written as bytes;
    rank-r products and residuals are added to what comes out.
    """
    shape, size = job.shape, job.compute_size
    linears = shape.linears(shape.mean_key_value)
    inputs = sum(linears[name][0] for name in ("q_proj", "o_proj", "gate_proj", "down_proj"))  # others share theirs
    outputs = sum(columns for _, columns in linears.values())
    return (inputs + outputs) * (4 * size + 1) + 2 * shape.hidden * 3 * size


def _again(job: Job, layer: _Layer, level: RecomputeLevel, fused: bool) -> float:
    """Seconds that a layer's second forward takes for one micro-batch."""
    if level == "full":
        forward = 1 / 2 if job.config.adapter else 1 / 3  # of matmuls: gradients of activations, and of weights
        traffic = calibration.FUSED_FORWARD if fused else calibration.UNFUSED_FORWARD
        return forward * layer.matmuls + traffic * layer.traffic + layer.dequantize
    if level == "none" or (level == "norms" and not fused):
        return 0.0
    if level == "norms":
        return layer.norms_traffic
    share = layer.mlp_matmuls / layer.matmuls  # of its weights, and so of what is dequantised
    down = 1.0 if fused else 1.5  # a checkpoint of the whole MLP multiplies by the third matrix too
    return layer.norms_traffic + down * (layer.mlp_matmuls + 2 * share * layer.dequantize)


def _exposed_gathers(job: Job, kind: Kind, computing: float) -> float:
    """Seconds of a micro-batch in which nothing is computed because a layer's weights are still on their way."""
    shape, num_layers = job.shape, job.shape.num_layers
    on_host = job.config.strategy.offload == "all"
    shards = job.num_shards if kind == "fsdp2" else job.num_gpus if kind == "zero3" else 1
    if shards == 1 and not on_host:
        return 0.0
    size = job.layer_bytes if job.config.adapter else job.compute_size * shape.layer_weights
    passes = 2 if job.config.strategy.reshard else 1
    gather = passes * size * (shards - 1) / shards / _fabric(job, shards)
    if on_host:
        gather += passes * size / shards / calibration.HOST_LINK
    return num_layers * max(0.0, gather - calibration.GATHER_OVERLAP * computing / num_layers)


def _exposed_gradients(job: Job, kind: Kind, computing: float) -> float:
    """Seconds of a step in which gradients are added up after the last backward, and fsdp2's adapters gathered."""
    if job.num_gpus == 1:
        return 0.0
    if kind == "fsdp2" and job.config.adapter:  # as a whole, before the first forward and after the last backward
        sent = (job.compute_size + 4) * job.trained_weights * (job.num_gpus - 1) / job.num_gpus
        return sent / _fabric(job, job.num_gpus)
    passes = 1 if kind in ("fsdp2", "zero2", "zero3") else 2  # scattered, or added up everywhere
    sent = passes * 4 * job.trained_weights * (job.num_gpus - 1) / job.num_gpus / _fabric(job, job.num_gpus)
    return max(0.0, sent - calibration.GATHER_OVERLAP * 2 / 3 * computing)


def _exposed_activations(job: Job, setting: Setting, computing: float) -> float:
    """Seconds of a micro-batch in which nothing is computed while activations go to the host or come back."""
    moving = offloaded_bytes(job, setting) / calibration.HOST_LINK
    forward = computing / 3
    return sum(max(0.0, moving - calibration.GATHER_OVERLAP * part) for part in (forward, computing - forward))


def _fabric(job: Job, group: int) -> float:
    """Bytes/s each way of a GPU among `group` neighbours."""
    if group > job.gpus_per_host:
        return calibration.BETWEEN_HOSTS
    return job.gpu.fabric * calibration.FABRIC_SHARE


def _waiting(job: Job, kind: Kind) -> float:
    if job.num_gpus == 1:
        return 0.0
    waiting = calibration.WAITING
    on_gpus = job.config.strategy.offload != "all"
    if kind == "fsdp2" and job.config.adapter and on_gpus and job.num_shards <= job.gpus_per_host:
        return waiting + calibration.PULLING
    gathers = calibration.GATHERING if kind in ("fsdp2", "zero3") else 0.0
    return waiting + gathers + (calibration.ZERO_3 if kind == "zero3" else 0.0)


def _optimizer(job: Job, kind: Kind) -> float:
    """Weights and moments are read and written, gradients read twice (for their norm too)."""
    shards = job.num_shards if kind == "fsdp2" else job.num_gpus if kind.startswith("zero") else 1
    weights, name = job.trained_weights / shards, job.config.optim.name
    if job.config.strategy.offload != "none":
        return weights / calibration.HOST_ADAM + 2 * weights * job.trained_size / calibration.HOST_LINK
    if name != "adamw":
        waits = job.num_stepped_tensors * calibration.TENSOR_SECONDS
        return weights * calibration.OPTIMIZER_BYTES[name] / job.gpu.bandwidth + waits
    moved = 2 * job.trained_size + 2 * job.moments_size + 2 * job.trained_size
    return weights * moved / (job.gpu.bandwidth * calibration.ADAMW_SHARE)
