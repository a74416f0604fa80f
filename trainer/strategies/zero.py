"""DeepSpeed's ZeRO (arXiv:1910.02054): moments (1), gradients too (2) or weights too (3) are cut over processes.

Bytes a trained weight takes on N processes, activations and buckets aside. Masters and moments are float32 always.

===================  ====================  ==================  ==========
.                    zero1                 zero2               zero3
===================  ====================  ==================  ==========
full, bfloat16       6 + 12/N              2 + 16/N            18/N
adapter or float32   8 + 12/N              4 + 16/N            20/N
===================  ====================  ==================  ==========

A full fine-tune in bfloat16 computes with bfloat16 copies of the masters, which are also what is gathered; gradients
are added up in float32. DeepSpeed makes the masters of those copies: a base in float32 begins rounded to bfloat16 here,
and under the other strategies does not. Elsewhere weights are float32, and DeepSpeed keeps masters apart from them all
the same: an adapter is small. Its own `bf16` and `fp16` modes stay off, for they would cast every frozen weight.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it guesses, and warns

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config import RunConfig
from trainer.data.types import PackedBatch
from trainer.errors import PacktrainError
from trainer.processes import Processes
from trainer.storage import allocate, put
from trainer.strategies.base import BuildOptimizer, Checkpoint, Fingerprint, StateDict, StepResult, Strategy
from trainer.strategies.rows import Rows, own_range

MOMENTS = ("exp_avg", "exp_avg_sq")
REDUCE_BUCKET = 10**8  # gradients reduced at a time
SUB_GROUP = 2 * 10**8  # weights stepped on at a time
PREFETCH = 10**8  # weights gathered ahead of need
RESTORED_AT_A_TIME = 2**28  # weights


class Zero(Strategy):
    """Trains with DeepSpeed's engine; needs a process group, of one process too.

    Args:
        kind: zero1, zero2 or zero3.
        fingerprint: of the quantised bytes of a module.
        keep_whole: zero3 leaves weights of at most this many elements whole between steps.
    """

    def __init__(
        self,
        processes: Processes,
        config: RunConfig,
        kind: str,
        fingerprint: Fingerprint = None,
        keep_whole: int = 100_000,
    ) -> None:
        self.processes, self.device, self.config = processes, processes.device, config
        self.name = kind
        self.stage, self.keep_whole = int(kind.removeprefix("zero")), keep_whole
        self._fingerprint = fingerprint
        _join_group(processes)
        self._rows = Rows(processes)

    # -------------------------------------------------------------------------------------------------- the model

    def shard(self, module: nn.Module) -> None:
        self.module = module
        self._homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # tied weights have several
        for owner in module.modules():
            for leaf, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                self._homes.setdefault(parameter, []).append((owner, leaf))
        if self.config.adapter is None:
            dtype = getattr(torch, self.config.compute_dtype)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)  # on the meta device
        if self.stage < 3:
            allocate(module, self.device)

    def place(self, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        parameter = owner.get_parameter(leaf)
        if self.stage < 3:
            put(parameter, whole)
            return
        assert parameter.shape == whole.shape and parameter.is_floating_point() == whole.is_floating_point()
        value = nn.Parameter(whole.to(self.device, parameter.dtype).contiguous(), parameter.requires_grad)
        for home, name in self._homes.pop(parameter):
            home.register_parameter(name, value)
        _partition(value, on_host=self.config.strategy.offload == "all")

    def prepare(self, build_optimizer: BuildOptimizer) -> None:
        root = self.module.get_submodule("model")
        self._trained = {name: p for name, p in root.named_parameters() if p.requires_grad}
        optimizer = _build_by_shape(build_optimizer, self._trained)
        settings = self._settings(sum(_whole_shape(p).numel() for p in self._trained.values()))
        self.engine: Any = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)[0]
        self._zero = self.engine.optimizer
        if self.stage == 3:
            self._register_adapters()

    def _settings(self, num_trained: int) -> dict[str, Any]:
        """DeepSpeed's configuration. What it would patch in torch (``memory_efficient_linear``) stays off."""
        is_cuda = self.device.type == "cuda"
        host = {"device": "cpu", "pin_memory": is_cuda}
        offload = self.config.strategy.offload
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": is_cuda and self.stage > 1,
            "reduce_bucket_size": max(1, min(REDUCE_BUCKET, num_trained)),
            "allgather_bucket_size": 2 * REDUCE_BUCKET,
            "sub_group_size": SUB_GROUP,
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": PREFETCH,
            "stage3_param_persistence_threshold": self.keep_whole,
        }
        if offload != "none":
            zero["offload_optimizer"] = host
        if offload == "all":
            zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # of any length: `forward_backward` says which is the last
            "gradient_clipping": self.config.optim.max_grad_norm or 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
        }

    def _register_adapters(self) -> None:
        """A PEFT layer computes with its children's weights without calling them: they are gathered for it."""
        for layer in self.module.modules():
            if hasattr(layer, "get_base_layer"):
                for parameter in layer.parameters():
                    deepspeed.zero.register_external_parameter(layer, parameter)

    # --------------------------------------------------------------------------------------------------- the step

    def forward_backward(
        self,
        micro_batches: Sequence[PackedBatch],
        num_trained_tokens: int,
        on_micro_batch: Callable[[int], None] = lambda index: None,
    ) -> torch.Tensor:
        loss_sum = torch.zeros((), device=self.device)
        # DeepSpeed averages over processes; here every token counts the same.
        factor = self.processes.world_size / max(1, num_trained_tokens)
        for index, batch in enumerate(micro_batches):
            on_micro_batch(index)
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            torch.manual_seed(batch.seed)
            loss = self.engine(batch.to(self.device))
            self.engine.backward(loss * factor, scale_wrt_gas=False)
            loss_sum += loss.detach()
        dist.all_reduce(loss_sum)
        return loss_sum

    def step(self, lr: float, max_norm: float | None) -> StepResult:
        assert max_norm == self.config.optim.max_grad_norm, "DeepSpeed clips to what it was started with"
        self.allocate_optimizer()
        self._zero.set_lr(lr)
        # Stages 1 and 2 look for overflows in float16 and float32 alone.
        if self.stage < 3 and not _is_norm(self._zero.scaled_global_norm()):
            self.discard_gradients()
            return StepResult(math.nan)
        self.engine.step()
        if not self.engine.was_step_applied():
            return StepResult(math.nan)
        return StepResult(float(self.engine.get_global_grad_norm()))

    def discard_gradients(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        if self.config.strategy.offload != "none":
            self._zero.reset_cpu_buffers()
        if self.stage == 3:  # the next backward overwrites
            return
        self._zero.micro_step_id = -1
        for gradients in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in gradients:
                gradients[group] = None

    # ------------------------------------------------------------------------------------------------- its state

    def allocate_optimizer(self) -> int:
        state = self._zero.optimizer.state
        missing = [flat for flat in self._masters() if flat not in state]
        if not missing:
            return 0
        fused = self._zero.optimizer.defaults["fused"]
        for flat in missing:
            count = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
            state[flat] = {"step": count, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if self.stage < 3:  # DeepSpeed would link after the first group's step, when the others have none
            self._zero._lazy_init_hp_params_optimizer_state()
        return 0

    def state_dict(self) -> StateDict:
        """Each process's rows of masters and moments, copied to host memory: gathered one weight at a time."""
        self.allocate_optimizer()
        count = self._zero.optimizer.state[self._masters()[0]]["step"].detach().cpu()
        state: StateDict = {}
        for name, parameter in self._trained.items():
            state[f"model.{name}"] = self._rows.own(safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                state[f"optim.{name}.{moment}"] = self._rows.own(whole)
            state[f"optim.{name}.step"] = count.clone()
        return state

    def restore(self, checkpoint: Checkpoint) -> None:
        self._check_names(checkpoint)
        self.allocate_optimizer()
        self.engine.empty_partition_cache()  # small weights stay gathered between steps
        for names in self._batches():
            shapes = {name: _whole_shape(self._trained[name]) for name in names}
            state: StateDict = {f"model.{name}": self._rows.zeros(shape) for name, shape in shapes.items()}
            for moment in MOMENTS:
                state |= {f"optim.{name}.{moment}": self._rows.zeros(shape) for name, shape in shapes.items()}
            checkpoint.load(state)
            for name in names:
                self._write(name, None, state.pop(f"model.{name}"))
                for moment in MOMENTS:
                    self._write(name, moment, state.pop(f"optim.{name}.{moment}"))
        if self.stage < 3:
            self._zero.update_lp_params()
        count = checkpoint.read(f"optim.{next(iter(self._trained))}.step")
        for flat in self._masters():
            self._zero.optimizer.state[flat]["step"].fill_(count.item())

    def fingerprint(self) -> str | None:
        if self._fingerprint is None:
            return None
        if self.stage < 3:
            return self._fingerprint(self.module, None)
        with self._own_bytes():
            return self._fingerprint(self.module, dist.group.WORLD)

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()  # modules gather their weights themselves wherever they are called

    def _check_names(self, checkpoint: Checkpoint) -> None:
        saved = {name.removeprefix("model.") for name in checkpoint.names if name.startswith("model.")}
        if different := sorted(saved ^ set(self._trained)):
            side = "the checkpoint" if different[0] in saved else "the recipe"
            raise PacktrainError(f"the checkpoint holds other weights: {different[0]} is only in {side}")
        for name in self._trained:
            for key in (*MOMENTS, "step"):
                if f"optim.{name}.{key}" not in checkpoint.names:
                    raise PacktrainError(
                        f"the checkpoint has no optim.{name}.{key}: its moments are not AdamW's in 32 bit, which is "
                        "what ZeRO steps with. Resume with the optimizer that wrote them"
                    )

    def _batches(self) -> Iterator[list[str]]:
        """Names of trained weights to restore together: reading each by itself would cost a round of messages each."""
        names: list[str] = []
        size = 0
        for name, parameter in self._trained.items():
            names.append(name)
            size += _whole_shape(parameter).numel()
            if size >= RESTORED_AT_A_TIME:
                yield names
                names, size = [], 0
        if names:
            yield names

    def _masters(self) -> list[torch.Tensor]:
        """This process's flat parts of the float32 weights."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _write(self, name: str, moment: str | None, rows: torch.Tensor) -> None:
        assert isinstance(rows, DTensor)
        parameter, whole = self._trained[name], rows.full_tensor()
        if self.stage < 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, whole)
            else:
                safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # DeepSpeed's setters of whole tensors fail on a last part that is padded.
        target: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        part = torch.zeros(target.ds_numel, dtype=whole.dtype, device=whole.device)
        own = whole.flatten()[own_range(whole.numel(), target.ds_numel, self.processes.rank)]
        part[: own.numel()] = own
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
            target.copy_(part)  # what is gathered
        else:
            safe_set_local_optimizer_state(parameter, part, moment)

    @contextmanager
    def _own_bytes(self) -> Iterator[None]:
        """Inside, a parameter of bytes is this process's flat part of it, without the padding."""
        cut: list[Any] = [p for p in self.module.parameters() if p.dtype == torch.uint8]
        before = [parameter.data for parameter in cut]
        try:
            for p in cut:
                own = own_range(p.ds_numel, p.ds_tensor.ds_numel, self.processes.rank)
                p.data = p.ds_tensor[: own.stop - own.start].to(self.device)
            yield
        finally:
            for parameter, data in zip(cut, before, strict=True):
                parameter.data = data


class _Host(CPU_Accelerator):
    """The CPU without DeepSpeed's extensions in C++, which take a minute or two to compile."""

    def create_op_builder(self, op_name: str) -> None:
        return None


class _Holder(nn.Module):
    """One parameter as a module, which is what DeepSpeed partitions."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def _join_group(processes: Processes) -> None:
    """Has DeepSpeed use the processes' group and device, and speak through this program's log."""
    # DeepSpeed's own calls of torch.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed_logger.handlers.clear()
    deepspeed_logger.propagate = True
    deepspeed_logger.addFilter(_is_news)
    if processes.device.type == "cpu":
        set_accelerator(_Host())
    # Read by DeepSpeed as the index of the GPU, which is another number where a task sees its own GPU alone.
    os.environ["LOCAL_RANK"] = str(processes.device.index or 0)
    deepspeed.init_distributed(dist_backend="nccl" if processes.device.type == "cuda" else "gloo", verbose=False)


def _is_news(record: logging.LogRecord) -> bool:
    # A batch goes into the root module, whose inputs need no gradient.
    return "unknown inputs or outputs type" not in record.getMessage()


def _partition(parameter: nn.Parameter, on_host: bool) -> None:
    deepspeed.zero.Init(
        module=_Holder(parameter),
        mem_efficient_linear=False,
        remote_device="cpu" if on_host else None,
        pin_memory=on_host and parameter.is_cuda,
        dtype=torch.float32,  # of what would be made inside; nothing is cast
    )


def _build_by_shape(build_optimizer: BuildOptimizer, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer over parameters that may be cut, grouped by the shapes they have when whole."""
    stand_ins = {name: torch.empty(_whole_shape(p), device="meta") for name, p in trained.items()}
    own = {id(stand_in): trained[name] for name, stand_in in stand_ins.items()}
    optimizer = build_optimizer(stand_ins.items())
    for group in optimizer.param_groups:
        group["params"] = [own[id(stand_in)] for stand_in in group["params"]]
    return optimizer


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_norm(norm: torch.Tensor) -> bool:
    return bool(torch.isfinite(norm) & (norm >= 0))
