"""What the models of memory and time read: a recipe, the shape of its model, and the GPUs it is to run on. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from trainer.config import RunConfig
from trainer.planning import calibration
from trainer.planning.hardware import Gpu
from trainer.planning.levels import LayerLevels
from trainer.planning.shape import LINEARS, ModelShape

Kind = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MODULES = {"embed_tokens", "lm_head"}  # that may be trained in full beside an adapter


@dataclass(frozen=True)
class Setting:
    """What is left to choose: how the step is spread, packs in one forward, and what layers compute again."""

    kind: Kind
    micro_batch: int
    levels: LayerLevels

    @classmethod
    def load(cls, kind: Kind, saved: Mapping[str, Any]) -> Setting:
        """From what `saved` gave."""
        return cls(kind, saved["micro_batch"], LayerLevels.build(saved["recompute"]))

    @property
    def saved(self) -> dict[str, Any]:
        """Sizes as a checkpoint's manifest has them."""
        return {"micro_batch": self.micro_batch, "recompute": self.levels.counts}

    def __str__(self) -> str:
        packs = "1 pack" if self.micro_batch == 1 else f"{self.micro_batch} packs"
        return f"micro-batch of {packs}, recompute {self.levels}"


@dataclass(frozen=True)
class Job:
    """A run on some GPUs.

    Attributes:
        fused: layers compute as three nodes (`trainer.model.recompute.has_fused_layers`); None: as the recipe implies.
        flash4: attention is flash-attn-4's; None: only if the recipe asks for it by name.
        trained_share: of the tokens that are in the loss.
        attended: positions that a token attends to, mean over tokens.
    """

    config: RunConfig
    shape: ModelShape
    gpu: Gpu
    num_gpus: int = 1
    gpus_per_host: int = 8
    fused: bool | None = None
    flash4: bool | None = None
    trained_share: float = calibration.TRAINED_SHARE
    attended: float = calibration.ATTENDED

    def has_fused_layers(self, kind: Kind) -> bool:
        """Whether decoder layers compute as three nodes: no dropout, no DoRA, and no engine that gathers by module."""
        if kind == "zero3":
            return False
        if self.fused is not None:
            return self.fused
        adapter = self.config.adapter
        return adapter is None or not (adapter.dropout or adapter.dora)

    @property
    def attention_share(self) -> float:
        """Of the peak FLOP/s that attention's kernels reach."""
        flash4 = self.config.model.attention == "flash4" if self.flash4 is None else self.flash4
        return calibration.FLASH4_SHARE if flash4 else calibration.VARLEN_SHARE

    @cached_property
    def packs_each(self) -> int:
        """Packs of a global batch that a process computes."""
        return -(-self.config.packs_per_step // self.num_gpus)

    @property
    def gpus_on_host(self) -> int:
        """Of the first host."""
        return min(self.num_gpus, self.gpus_per_host)

    @property
    def num_shards(self) -> int:
        """Processes that share one copy where weights are cut."""
        return min(self.config.strategy.shard_size or self.num_gpus, self.num_gpus)

    @cached_property
    def compute_size(self) -> int:
        """Bytes of an activation."""
        return SIZES[self.config.compute_dtype]

    @cached_property
    def adapted(self) -> tuple[str, ...]:
        """A layer's linears that carry an adapter."""
        if self.config.adapter is None:
            return ()
        targets = self.config.adapter.targets
        if targets == "all-linear":
            return LINEARS
        short = {target.rpartition(".")[2] for target in targets}
        return tuple(name for name in LINEARS if name in short)

    @cached_property
    def layer_adapter_weights(self) -> float:
        """Trained low-rank weights of a layer, mean over layers."""
        if self.config.adapter is None:
            return 0.0
        linears = self.shape.linears(self.shape.mean_key_value)
        return self.config.adapter.r * sum(sum(linears[name]) for name in self.adapted)

    @cached_property
    def saved_modules_weights(self) -> int:
        """Weights of embeddings or head that are trained in full beside an adapter."""
        modules = self.config.adapter.modules_to_save if self.config.adapter else []
        return len(MODULES.intersection(modules)) * self.shape.vocab * self.shape.hidden

    @cached_property
    def trained_weights(self) -> int:
        """Weights with gradients and moments."""
        if self.config.adapter is None:
            return self.shape.weights
        return round(self.shape.num_layers * self.layer_adapter_weights) + self.saved_modules_weights

    @property
    def num_stepped_tensors(self) -> int:
        """Of decoder layers: those that an optimizer steps on one by one."""
        return self.shape.num_layers * (2 * len(self.adapted) if self.config.adapter else len(LINEARS) + 2)

    @property
    def trained_size(self) -> int:
        """Bytes of a trained weight, of its gradient, and of each of its moments unless they are in 8 bit."""
        return SIZES[self.config.train.param_dtype]

    @cached_property
    def moments_size(self) -> float:
        """Bytes of both moments of a trained weight."""
        if self.config.optim.name.endswith("8bit"):
            return 2 + 2 * 4 / 256  # two codes; a float32 scale of each for 256
        return 8 if self.config.optim.name.endswith("32bit") else 2 * self.trained_size

    @cached_property
    def linear_size(self) -> float:
        """Bytes of one weight of a base's matrix, as it rests."""
        quantization = self.config.quantization
        if quantization is None:
            return SIZES[self.config.model.dtype] if self.config.adapter else self.trained_size
        if quantization.type == "int8":
            return 1 + 4 / self.shape.hidden  # a float32 scale a row
        scales = 1 / 64 + 4 / (64 * 256) if quantization.double_quant else 4 / 64
        return 0.5 + scales

    @property
    def dense_size(self) -> int:
        """Bytes of one weight of a base's norms, embeddings and head."""
        return SIZES[self.config.model.dtype] if self.config.adapter else self.trained_size

    @cached_property
    def layer_bytes(self) -> float:
        """Bytes of the frozen or trained base of a layer, mean over layers."""
        return self.linear_size * self.shape.layer_weights + 2 * self.shape.hidden * self.dense_size

    @cached_property
    def root_bytes(self) -> float:
        """Bytes of embeddings, head and last norm."""
        return (self.shape.embedding_weights + self.shape.hidden) * self.dense_size
