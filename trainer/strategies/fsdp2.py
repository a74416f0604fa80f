"""FSDP2: weights, gradients and moments cut by rows over processes, gathered layer by layer (`fully_shard`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
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
from trainer.storage import allocate, put
from trainer.strategies.base import BuildOptimizer, Fingerprint
from trainer.strategies.frozen import FrozenLayers
from trainer.strategies.gathering import choose_piece
from trainer.strategies.single import SingleProcess

CPU = torch.device("cpu")


class FullyShard(SingleProcess):
    """Every process holds its rows of what is trained; a layer is whole only while it computes.

    Of a model that is trained as a whole, FSDP2 gathers layer by layer, and adds up gradients so. Under an adapter the
    layers' frozen weights are cut by `FrozenLayers`; the model's ends, which a micro-batch needs whole from its first
    moment to its last, are whole everywhere; and the adapter is FSDP2's, in one piece: it is small, and a collective
    for each layer would have processes wait for one another as often.

    Args:
        compute_dtype: of the matmuls; trained weights are gathered in it, gradients added up in float32.
    """

    name = "fsdp2"
    can_begin_anew = False  # after a backward that failed FSDP2 waits for its end, and drops the next one's gradients

    def __init__(
        self,
        processes: Processes,
        config: StrategyConfig,
        compute_dtype: torch.dtype,
        loss_scaling: bool = False,
        fingerprint: Fingerprint = None,
    ) -> None:
        super().__init__(processes, loss_scaling, config.offload == "optimizer", fingerprint)
        self.config, self.compute_dtype = config, compute_dtype
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
        causal_lm: Any = module.get_submodule("model.base_model.model" if _is_peft(module) else "model")
        layers = list(causal_lm.model.layers)
        self._frozen: FrozenLayers | None = None
        if not all(parameter.requires_grad for parameter in module.parameters()):
            make_piece = choose_piece(self.processes, self._shard_group, self.device, self.home)
            self._frozen = FrozenLayers(layers, self._shard_group, self.device, make_piece, self.config.reshard)
        frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
        options = self._options() | {"ignored_params": frozen}
        if self._frozen is None:
            for layer in layers:
                fully_shard(layer, reshard_after_forward=self.config.reshard, **options)
            for earlier, later in itertools.pairwise(layers):
                earlier.set_modules_to_forward_prefetch([later])
                later.set_modules_to_backward_prefetch([earlier])
        fully_shard(module, reshard_after_forward=False, **options)
        module._apply(lambda t: torch.empty_like(t, device=self.home) if isinstance(t, DTensor) else t)
        allocate(module, self.device)

    def prepare(self, build_optimizer: BuildOptimizer) -> None:
        super().prepare(build_optimizer)
        if self._frozen:
            self._frozen.settle(self.processes)

    def place(self, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        parameter: Any = owner.get_parameter(leaf)
        if self._frozen and parameter in self._frozen:
            self._frozen.place(parameter, whole)
            return
        if not parameter.requires_grad:
            put(parameter, whole)
            return
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
        if self._fingerprint is None:
            return None
        assert self._frozen, "a quantised base is never trained"
        return self._fingerprint(self.module, self._shard_group, self._frozen.own)

    def wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        whole: Any = self._trained[name]
        mesh = self._host_mesh if local.device.type == "cpu" else self.mesh
        return DTensor.from_local(
            local, mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    @contextmanager
    def _micro_batch(self, is_last: bool) -> Iterator[None]:
        root: Any = self.module
        # A whole model's gradients are added up in shards, for there is no room for more; an adapter's are small, and
        # what they cost to send is paid once a step, as is its way to all.
        root.set_requires_gradient_sync(is_last or self._frozen is None)
        root.set_reshard_after_backward(is_last or self._frozen is None)
        root.set_is_last_backward(is_last)
        yield
        if self._frozen:
            self._frozen.end_backward()

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
        if self._frozen:
            self._frozen.release()
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
        policy = MixedPrecisionPolicy(self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return {
            "mesh": self.mesh,
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.home != self.device
            else OffloadPolicy(),
        }


def _is_peft(module: nn.Module) -> bool:
    return hasattr(module.get_submodule("model"), "peft_config")
