"""FSDP2: weights, gradients and moments cut by rows over processes, gathered layer by layer (`fully_shard`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.config import StrategyConfig
from trainer.errors import UserError
from trainer.processes import Processes
from trainer.storage import put
from trainer.strategies.base import Fingerprint
from trainer.strategies.single import SingleProcess

CPU = torch.device("cpu")
# torch 2.11 shards floating parameters only; what is sharded as bytes there is seen as floats.
SHARDS_BYTES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class FullyShard(SingleProcess):
    """Every process holds its rows of each parameter; a layer is whole only while it computes.

    Args:
        compute_dtype: of the matmuls; weights are gathered in it, gradients added up in float32.
        bit_view: shard quantised bytes as a view in float32. A cast would destroy them, so nothing of such a model is
            gathered in another dtype than it rests in. Not in a narrower one: on CUDA, FSDP2 collects what it sends by
            ``torch._foreach_copy_``, which takes 16-bit floats through float32 and makes all NaNs one.
    """

    name = "fsdp2"

    def __init__(
        self,
        processes: Processes,
        config: StrategyConfig,
        compute_dtype: torch.dtype,
        loss_scaling: bool = False,
        fingerprint: Fingerprint = None,
        bit_view: bool = not SHARDS_BYTES,
    ) -> None:
        super().__init__(processes, loss_scaling, config.offload == "optimizer", fingerprint)
        self.config, self.compute_dtype, self.bit_view = config, compute_dtype, bit_view
        self.home = CPU if config.offload == "all" else self.device  # where shards rest
        self.num_shards = config.shard_size or processes.world_size
        self.mesh = self._build_mesh(self.device.type)
        self.shard_index = self.mesh.get_local_rank("shard")
        self._shard_group = self.mesh.get_group("shard")
        # For moments in host memory, paged ones of GPUs among them: only the mesh says where a DTensor's part lies, and
        # what lies elsewhere is copied.
        self._host_mesh = self.mesh if self.device.type == "cpu" else self._build_mesh("cpu")

    def shard(self, module: nn.Module) -> None:
        self.module = module
        self._trains_base = all(parameter.requires_grad for parameter in module.parameters())
        self._gather_dtype: torch.dtype | None = self.compute_dtype
        if self.bit_view and any(parameter.dtype == torch.uint8 for parameter in module.parameters()):
            _view_bytes_as_floats(module)
            self._gather_dtype = None
        causal_lm: Any = module.get_submodule("model.base_model.model" if _is_peft(module) else "model")
        layers = list(causal_lm.model.layers)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=self.config.reshard, **self._options())
        fully_shard(module, reshard_after_forward=False, **self._options())
        for earlier, later in itertools.pairwise(layers):
            earlier.set_modules_to_forward_prefetch([later])
            later.set_modules_to_backward_prefetch([earlier])
        # Parameters alone: buffers without storage are filled by whoever loads the model.
        module._apply(lambda t: torch.empty_like(t, device=self.home) if isinstance(t, nn.Parameter) else t)

    def place(self, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        parameter: Any = owner.get_parameter(leaf)
        if whole.dtype == torch.uint8 != parameter.dtype:
            whole = whole.contiguous().view(parameter.dtype)
        local: torch.Tensor = parameter.to_local()
        rows_each = -(-whole.shape[0] // self.num_shards)
        put(local, whole.narrow(0, min(self.shard_index * rows_each, whole.shape[0]), local.shape[0]))

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        root: Any = self.module  # the layers gather themselves wherever they are called
        root._get_fsdp_state()._lazy_init()  # else the first layer that is called would take itself for the root
        root.unshard()
        try:
            yield
        finally:
            self._reshard()

    def fingerprint(self) -> str | None:
        self._reshard()
        return self._fingerprint(self.module, self._shard_group) if self._fingerprint else None

    def wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        whole: Any = self._trained[name]
        mesh = self._host_mesh if local.device.type == "cpu" else self.mesh
        return DTensor.from_local(
            local, mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        root: Any = self.module
        # A whole model's gradients are added up in shards, for there is no room for more; an adapter's are small, and
        # what they cost to send is paid once a step.
        root.set_requires_gradient_sync(is_last or self._trains_base)
        root.set_is_last_backward(is_last)
        return nullcontext()

    def _sum(self, loss_sum: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(loss_sum)
        return loss_sum

    def _local(self, parameter: torch.Tensor) -> torch.Tensor:
        cut: Any = parameter
        with torch.no_grad():  # detaching a DTensor costs 20 microseconds, and there are hundreds a step
            return cut.to_local()

    def _square_sum(self, grads: list[torch.Tensor]) -> torch.Tensor:
        total = super()._square_sum(grads).to(self.device)
        # Over the copies too, which hold the same: added up in another order it would clip them differently.
        dist.all_reduce(total)
        return total / (self.processes.world_size // self.num_shards)

    def _reshard(self) -> None:
        """Frees what was gathered; layers that are to stay so after a forward wait for a backward else."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _build_mesh(self, device_type: str) -> DeviceMesh:
        """Processes by copy and shard; neighbours, which share a host, share a copy."""
        world_size = self.processes.world_size
        if world_size % self.num_shards:
            raise UserError(
                "strategy.shard_size",
                f"{self.num_shards} with {world_size} processes",
                f"a divisor of {world_size}",
                "take the number of GPUs on a host, or leave it out",
            )
        copies = world_size // self.num_shards
        if copies == 1:
            return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
        return init_device_mesh(device_type, (copies, self.num_shards), mesh_dim_names=("copy", "shard"))

    def _options(self) -> dict[str, Any]:
        policy = MixedPrecisionPolicy(self._gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return {
            "mesh": self.mesh,
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.home != self.device
            else OffloadPolicy(),
        }


def _view_bytes_as_floats(module: nn.Module) -> None:
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype != torch.uint8:
                continue
            if parameter.shape[-1] % 4:
                raise UserError(
                    "strategy.kind",
                    f"fsdp2 with torch {torch.__version__}, and {leaf} of {parameter.shape[-1]} bytes a row",
                    "a multiple of 4",
                    "take torch 2.13, or strategy.kind: ddp",
                )
            view = nn.Parameter(parameter.detach().view(torch.float32), requires_grad=False)
            owner.register_parameter(leaf, view)


def _is_peft(module: nn.Module) -> bool:
    return hasattr(module.get_submodule("model"), "peft_config")
