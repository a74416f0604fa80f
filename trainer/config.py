"""RunConfig: everything a recipe can say. Imports no torch, so a login node can read recipes.

Every part is frozen and refuses unknown keys; `recipe.load_recipe` turns pydantic's errors into messages with lines.
A field is here because code reads it: a second way to set a thing is a defect.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from trainer.config_rules import broken_rules

Dtype = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
RecomputeLevel = Literal["none", "norms", "mlp", "full"]  # what a decoder layer computes again in backward
# SLURM's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.
JOB_TIME = re.compile(r"(?:(?P<days>[0-9]{1,4})-)?(?P<clock>[0-9]{1,6}(?::[0-9]{1,2}){0,2})")


class Part(BaseModel):
    """Base of every section: frozen, strict about keys, defaults documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Part):
    """The base model."""

    path: str = Field(description="folder or hub id of a Llama-family model in safetensors")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    tokenizer: str | None = Field(None, description="folder or hub id of the tokenizer; default: the model's")
    dtype: Dtype = Field("bfloat16", description="dtype of frozen weights and of the forward's matmuls")
    attention: Literal["auto", "flash4", "varlen", "sdpa"] = Field(
        "auto",
        description="auto: on CUDA flash-attn-4 where it is installed and proves right, else torch's varlen; sdpa by "
        "document elsewhere",
    )
    trust_remote_code: bool = Field(False, description="let the hub's tokenizer code run")
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="random: the config's shape with random weights (benchmarks, pre-training)",
    )


class QuantizationConfig(Part):
    """Quantised base for QLoRA (arXiv:2305.14314); activations and matmuls are in compute_dtype."""

    type: Literal["nf4", "fp4", "int8"] = Field(
        "nf4", description="4 bits with a scale for each 64 weights, or 8 bits with one for each row (arXiv:2208.07339)"
    )
    double_quant: bool = Field(
        default_factory=lambda fields: fields.get("type") != "int8",
        description="quantise the scales of 4-bit weights too (0.37 bits a weight less)",
        json_schema_extra={"default": True},  # of every type that can have it
    )
    compute_dtype: Dtype | None = Field(None, description="dtype weights are dequantised to; default: model.dtype")


class AdapterConfig(Part):
    """Low-rank adapter (arXiv:2106.09685) in PEFT's terms."""

    method: Literal["lora"] = Field("lora", description="adapter method")
    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale numerator: alpha / r, or alpha / sqrt(r) with rslora")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or names of linear modules such as q_proj"
    )
    rslora: bool = Field(False, description="rank-stabilised scale (arXiv:2312.03732)")
    dora: bool = Field(False, description="weight-decomposed adapter (arXiv:2402.09353)")
    modules_to_save: list[str] = Field([], description="modules trained in full too (embed_tokens, lm_head)")


RowFormat = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "input_output", "text", "templated"]


def value_key(value: object) -> object:
    """Equal for values that are one to a recipe: 1 and 1.0, but not true."""
    return (bool, value) if isinstance(value, bool) else value


class Where(Part):
    """Rows by the value of a column: all that have one of `values`, or an exact mix of them."""

    column: str = Field(description="column of the data set")
    values: list[str | bool | int | float] = Field(min_length=1, description="values whose rows are taken")
    ratios: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="share of total for each of values, in their order; they add up to 1"
    )
    total: int | None = Field(None, ge=1, description="rows in all, drawn with data.split.seed")

    @model_validator(mode="after")
    def _an_exact_mix(self) -> Where:
        if len(set(map(value_key, self.values))) < len(self.values):
            raise ValueError(f"values has one twice: {', '.join(map(str, self.values))}")
        if (self.ratios is None) != (self.total is None):
            raise ValueError("ratios and total come together: give both, or neither to take all rows of the values")
        if self.ratios is None:
            return self
        if len(self.ratios) != len(self.values):
            raise ValueError(f"ratios are {len(self.ratios)} and values {len(self.values)}: give one for each value")
        if abs(math.fsum(self.ratios) - 1) > 1e-6:
            raise ValueError(f"ratios add up to {math.fsum(self.ratios):g}: they have to add up to 1")
        return self


class Source(Part):
    """One data set, or one split of it."""

    path: str = Field(description="file, folder, pattern such as data/*.jsonl, or hub id")
    name: str | None = Field(None, description="configuration of a hub data set that has several")
    revision: str | None = Field(None, description="revision of a hub data set (branch, tag or commit)")
    split: str = Field("train", description="split of a hub data set or of a folder")
    format: RowFormat = Field(description="how its rows are read")
    columns: dict[str, str] = Field(
        {}, description="the format's field -> the data set's column, or text of several: \"{schema} {question}\""
    )
    where: Where | None = Field(None, description="take rows by the value of a column only")
    sample: int | None = Field(None, ge=1, description="take this many rows, drawn with data.split.seed")
    weight: float = Field(
        1.0, gt=0, le=100, description="how often a row is trained on in an epoch: 0.5 half of them, 2 each twice"
    )

    @model_validator(mode="after")
    def _one_count(self) -> Source:
        if self.sample is not None and self.where is not None and self.where.total is not None:
            raise ValueError("sample and where.total both say how many rows: keep one of them")
        return self


class SplitConfig(Part):
    """Shares of the training rows held out, drawn by seed."""

    validation: Share | list[Source] = Field(0.0, description="share of train's rows, or sources of their own")
    test: Share | list[Source] = Field(0.0, description="share of train's rows, or sources of their own")
    seed: int = Field(42, description="seed of the draw")


class DataConfig(Part):
    """What is trained on, and how rows become tokens."""

    train: list[Source] = Field(min_length=1, description="sources, concatenated")
    template: str = Field(
        "tokenizer",
        description="tokenizer (its chat template), alpaca, llama2, llama3, chatml, a .jinja file, or Jinja itself",
    )
    train_on: Literal["all", "assistant", "last_assistant"] = Field("assistant", description="tokens in the loss")
    split: SplitConfig = SplitConfig()
    pack_length: int = Field(4096, ge=8, le=2**20, description="tokens in a pack")
    packing: bool = Field(True, description="false: one row a pack")
    long_rows: Literal["truncate", "drop"] = Field("truncate", description="rows longer than pack_length")


class StrategyConfig(Part):
    """How the step is spread over processes."""

    kind: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        "auto", description="auto: single; of several processes ddp or fsdp2, as the planner finds faster"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keep moments, or weights too (fsdp2, zero3), in host memory"
    )
    reshard: bool = Field(True, description="fsdp2: free a layer's gathered weights between forward and backward")
    shard_size: int | None = Field(
        None, ge=2, description="fsdp2: processes that share one copy, replicated beyond (HSDP); default: all"
    )


class OptimConfig(Part):
    """The optimizer."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw", description="optimizer"
    )
    lr: float = Field(2.0e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, on matrices only")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay rates of the moments")
    eps: float = Field(1.0e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient's norm to this; null: never")


class ScheduleConfig(Part):
    """The learning rate over steps."""

    name: Literal["constant", "linear", "cosine", "wsd", "plateau"] = Field("cosine", description="shape after warm-up")
    warmup: float = Field(0.03, ge=0, description="below 1 a share of all steps, from 1 a number of steps")
    min_lr: float = Field(0.0, ge=0, le=1, description="share of the peak that remains at the end")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: share of all steps in its linear decay")
    factor: float = Field(0.5, gt=0, lt=1, description="plateau: lr is multiplied by this ...")
    patience: int = Field(2, ge=0, description="plateau: ... after this many evaluations without improvement")

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, warmup: float) -> float:
        if warmup > 1 and not warmup.is_integer():
            raise ValueError(f"schedule.warmup is {warmup}: below 1 it is a share of all steps, from 1 a whole number")
        return warmup


class GlobalBatch(Part):
    """Size of one optimizer step over all processes, in tokens or rows. Accumulation is derived."""

    tokens: int | None = Field(None, ge=1, description="token budget; tokens // pack_length packs, at least one")
    rows: int | None = Field(None, ge=1, description="number of packs (of rows without packing)")

    @model_validator(mode="after")
    def _one_of_both(self) -> GlobalBatch:
        if (self.tokens is None) == (self.rows is None):
            raise ValueError("give either tokens or rows")
        return self


class TrainConfig(Part):
    """Length, batch and determinism of the run."""

    epochs: float = Field(1.0, gt=0, le=1e5, description="passes over the training packs")
    max_steps: int | None = Field(None, ge=1, description="exactly this many steps, whatever epochs says")
    global_batch: GlobalBatch = GlobalBatch(tokens=65536, rows=None)
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="packs in one forward")
    recompute: (
        Literal["auto", "none", "norms", "mlp", "full"]
        | Annotated[dict[RecomputeLevel, PositiveInt], Field(min_length=1)]
    ) = Field(
        "auto",
        description="computed again in backward: none, norms and activation, mlp, or full layers; or so many layers of "
        "each from the bottom: {full: 12, none: 20}",
    )
    float8: bool = Field(
        False,
        description="multiply frozen weights in float8 (rowwise e4m3); faster on Ada, Hopper and later, less exact",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of trained weights and moments")
    keep_in_float8: bool = Field(
        False, description="gate and up activations are kept for backward in float8, a scale a row; less exact"
    )
    offload_activations: bool = Field(
        False, description="what waits for backward lies in host memory: for sequences too long for the GPU"
    )
    log_every: int = Field(1, ge=1, description="steps between log lines (metrics.jsonl has every step)")
    device: Literal["auto", "cpu"] = Field(
        "auto", description="auto: GPUs where there are; cpu: a rehearsal on the CPU"
    )
    seed: int = Field(42, description="seed of sample order, dropout and adapter weights")


class EarlyStopping(Part):
    """Stop when the validation loss no longer improves."""

    patience: int = Field(3, ge=1, description="evaluations without improvement")
    min_delta: float = Field(0.0, ge=0, description="smallest decrease that counts as improvement")


class EvalConfig(Part):
    """Evaluation during training."""

    every_steps: int | None = Field(None, ge=1, description="steps between evaluations; default: at the end only")
    samples: list[str] = Field([], description="prompts answered at every evaluation")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer, in tokens")
    early_stopping: EarlyStopping | None = None


class CheckpointConfig(Part):
    """What is kept while training."""

    every_steps: int | None = Field(None, ge=1, description="steps between checkpoints; default: at the end only")
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="keep the one of lowest validation loss; load it at the end")


class TrackingConfig(Part):
    """Where metrics go beside metrics.jsonl."""

    to: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="trackers")
    project: str = Field("packtrain", description="project name for trackers that have one")


def minutes_of(time: str) -> int:
    """A job's time in minutes, rounded up as SLURM does.

    Raises:
        ValueError: no time in one of SLURM's forms, or none at all.
    """
    match = JOB_TIME.fullmatch(time)
    if not match:
        raise ValueError("a time is written 30 (minutes), 04:00:00, 2-00 or 2-12:00:00 (days first)")
    clock = [int(part) for part in match["clock"].split(":")]
    if match["days"]:
        hours, minutes, seconds = clock + [0] * (3 - len(clock))
    elif len(clock) == 3:
        hours, minutes, seconds = clock
    else:
        hours, minutes, seconds = 0, *(clock + [0] * (2 - len(clock)))
    total = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError("a job of no time")
    return -(-total // 60)


def _one_line(text: str) -> str:
    """Whatever goes into a job script stays on its line."""
    if not text.isprintable() or not text.strip():
        raise ValueError("text on one line, not empty")
    return text


def _job_time(text: str) -> str:
    minutes_of(text)
    return text


Line = Annotated[str, AfterValidator(_one_line)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]


class SlurmConfig(Part):
    """What `packtrain submit` asks SLURM for. A cluster's profile is a file of these fields, laid underneath."""

    partition: Line | None = Field(None, description="partition; default: the cluster's")
    account: Line | None = Field(None, description="account that is charged")
    qos: Line | None = Field(None, description="quality of service")
    constraint: Line | None = Field(None, description="features that nodes must have")
    exclude: list[Line] = Field([], description="nodes never to run on")
    time: Annotated[str, AfterValidator(_job_time)] = Field(
        "04:00:00", description="limit of one job; the run goes on in the next"
    )
    nodes: int = Field(1, ge=1, description="nodes")
    gpus_per_node: int = Field(8, ge=0, description="GPUs a node, one process each; 0: one process a node on the CPU")
    gpu_type: Line | None = Field(None, description="kind of GPU, as the cluster names it")
    cpus_per_gpu: int | None = Field(None, ge=1, description="CPU cores for each process; default: the cluster's")
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = Field(
        None, description="host memory a node, such as 480G; 0: all of it; default: the cluster's"
    )
    exclusive: bool = Field(False, description="whole nodes, shared with no other job")
    cpu_partition: Line | None = Field(None, description="partition of jobs that need no GPU; default: partition")
    stop_seconds: int = Field(
        120, ge=30, description="seconds before the limit at which the run saves and stops; SLURM may be 60 s early"
    )
    max_restarts: int = Field(100, ge=0, description="times the job is queued again before it is given up")
    modules: list[Line] = Field([], description="environment modules to load")
    setup: list[Line] = Field([], description="shell commands before the run, such as: conda activate packtrain")
    env: dict[VariableName, Line] = Field({}, description="environment variables, such as NCCL_SOCKET_IFNAME: ib0")
    python: Line | None = Field(
        None, description="how nodes call Python, such as: apptainer exec --nv image.sif python; default: this one"
    )
    srun_args: list[Line] = Field([], description="further arguments of srun, such as --container-image=... for Pyxis")
    sbatch: dict[OptionName, Line | int | bool] = Field(
        {}, description="further options of sbatch by their long names, such as reservation: maintenance"
    )

    @property
    def minutes(self) -> int:
        """The limit of one job in minutes."""
        return minutes_of(self.time)

    @property
    def tasks_per_node(self) -> int:
        """Processes a node."""
        return max(1, self.gpus_per_node)


class ExportConfig(Part):
    """What happens when training is done."""

    merge: bool = Field(False, description="merge the adapter into the base, under merged/")
    base: Literal["dequantized", "original"] = Field(
        "dequantized", description="merge onto the weights trained on, or onto the 16-bit ones"
    )
    verify: bool = Field(True, description="prove that the merged model is the trained one")


class RunConfig(Part):
    """A whole recipe."""

    model: ModelConfig
    quantization: QuantizationConfig | None = None
    adapter: AdapterConfig | None = None
    data: DataConfig
    strategy: StrategyConfig = StrategyConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    slurm: SlurmConfig = SlurmConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        """Reports all broken rules together, one a line, each beginning with the field it is about."""
        if broken := broken_rules(self):
            raise ValueError("\n".join(broken))
        return self

    @property
    def compute_dtype(self) -> Dtype:
        """Dtype of the forward's matmuls."""
        return (self.quantization and self.quantization.compute_dtype) or self.model.dtype

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        """How the model is trained, in the field's words."""
        if self.adapter is None:
            return "full"
        return "qlora" if self.quantization else "lora"

    @property
    def packs_per_step(self) -> int:
        """Packs in one optimizer step over all processes."""
        batch = self.train.global_batch
        return batch.rows or max(1, (batch.tokens or 0) // self.data.pack_length)
