"""One process, one device: plain autograd. The others build on it and are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from trainer.data.types import PackedBatch
from trainer.optim import paged_bytes
from trainer.processes import Processes
from trainer.storage import allocate, put
from trainer.strategies.base import BuildOptimizer, Checkpoint, Fingerprint, StateDict, StepResult, Strategy
from trainer.strategies.moments import Moments, min_8bit_size
from trainer.strategies.scaler import LossScaler


class SingleProcess(Strategy):
    """Trains on this process's device alone.

    Args:
        loss_scaling: scale the loss dynamically; float16 needs it.
        offload: keep masters and moments in host memory and step there.
        fingerprint: of the quantised bytes of a module.
    """

    name = "single"
    can_begin_anew = True
    num_shards, shard_index = 1, 0

    def __init__(
        self, processes: Processes, loss_scaling: bool = False, offload: bool = False, fingerprint: Fingerprint = None
    ) -> None:
        self.processes, self.device, self.offload = processes, processes.device, offload
        self.scaler = LossScaler(loss_scaling)
        self._fingerprint = fingerprint

    def shard(self, module: nn.Module) -> None:
        self.module = module
        allocate(module, self.device)

    def place(self, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        put(owner.get_parameter(leaf), whole)

    def prepare(self, build_optimizer: BuildOptimizer) -> None:
        self._trained = dict(self._named_trained())
        locals_ = {name: self._local(parameter) for name, parameter in self._trained.items()}
        self._local_weights = {name: local for name, local in locals_.items() if local.numel()}
        self._masters = {name: self._master(local) for name, local in self._local_weights.items()}
        self._saved_weights = {f"model.{name}": parameter.detach() for name, parameter in self._trained.items()}
        shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        self.optimizer = build_optimizer(self._masters.items(), min_8bit_size(shapes, self.num_shards))
        self.moments = Moments(self.optimizer, self._masters, self)

    def forward_backward(
        self,
        micro_batches: Sequence[PackedBatch],
        num_trained_tokens: int,
        on_micro_batch: Callable[[int], None] = lambda index: None,
    ) -> torch.Tensor:
        loss_sum = torch.zeros((), device=self.device)
        # Engines average over processes; here every token counts the same.
        factor = self.scaler.scale * self.processes.world_size / max(1, num_trained_tokens)
        for index, batch in enumerate(micro_batches):
            on_micro_batch(index)
            with self._micro_batch(is_last=index == len(micro_batches) - 1):
                torch.manual_seed(batch.seed)
                loss = self._forward(batch.to(self.device))
                (loss * factor).backward()
            loss_sum += loss.detach()
        return self._sum(loss_sum)

    def step(self, lr: float, max_norm: float | None) -> StepResult:
        grads = self._gradients()
        norm = self._square_sum(list(grads.values())).sqrt() / self.scaler.scale
        clip = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1.0)
        result = StepResult(norm, counts=self.scaler.at_minimum)
        if self.optimizer.defaults.get("fused"):
            self._update_unless(~norm.isfinite(), grads, lr, clip * self.scaler.scale)
        elif not result.skipped:
            torch._foreach_div_(list(grads.values()), clip.item() * self.scaler.scale)
            self._update(grads, lr)
        self.discard_gradients()
        if self.scaler.enabled:
            self.scaler.update(overflow=result.skipped)
        return result

    def discard_gradients(self) -> None:
        for tensor in (*self._trained.values(), *self._masters.values()):
            tensor.grad = None

    def allocate_optimizer(self) -> int:
        self.moments.allocate()
        return paged_bytes(self.optimizer)

    def state_dict(self) -> StateDict:
        state = dict(self._saved_weights)
        state |= self.moments.state_dict()
        if self.scaler.enabled:
            state["scaler.scale"] = torch.tensor(self.scaler.scale)
            state["scaler.good_steps"] = torch.tensor(self.scaler.good_steps)
        return state

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.load(dict(self._saved_weights))
        for name, local in self._local_weights.items():
            put(self._masters[name], local)
        self.moments.restore(checkpoint)
        if self.scaler.enabled and "scaler.scale" in checkpoint.names:
            self.scaler.scale = checkpoint.read("scaler.scale").item()
            self.scaler.good_steps = int(checkpoint.read("scaler.good_steps").item())

    def fingerprint(self) -> str | None:
        return self._fingerprint(self.module, None) if self._fingerprint else None

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    # ------------------------------------------------------------------------------ where a checkpoint's rows lie

    def shape(self, name: str) -> torch.Size:
        """Whole shape of a trained parameter."""
        return self._trained[name].shape

    def wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A tensor laid out as this process's part of parameter `name`, as a checkpoint saves it."""
        return local

    # ------------------------------------------------------------------------------ what other strategies change

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.module(batch)

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def _sum(self, loss_sum: torch.Tensor) -> torch.Tensor:
        return loss_sum

    def _local(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter

    def _square_sum(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """Sum of squares over the whole gradient, float32."""
        if not grads:
            return torch.zeros((), device=self.device)
        return torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).square_().sum()

    # -------------------------------------------------------------------------------------------------------------

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This process's part of the gradient, by parameter."""
        grads = {name: self._trained[name].grad for name in self._masters}
        return {name: self._local(grad) for name, grad in grads.items() if grad is not None}

    def _update_unless(
        self, skip: torch.Tensor, grads: dict[str, torch.Tensor], lr: float, divisor: torch.Tensor
    ) -> None:
        """Updates by gradients over `divisor`, or changes nothing, without the host's having looked at either.

        A fused kernel reads them on the device; this is how torch's GradScaler tells it of them.
        """
        optimizer: Any = self.optimizer
        home = next((master.device for master in self._masters.values()), divisor.device)
        optimizer.grad_scale, optimizer.found_inf = divisor.to(home), skip.float().to(home)
        self._update(grads, lr)
        optimizer.grad_scale = optimizer.found_inf = None

    def _update(self, grads: dict[str, torch.Tensor], lr: float) -> None:
        for name, grad in grads.items():
            self._masters[name].grad = grad.to(self._masters[name].device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.offload:
            for name, local in self._local_weights.items():
                put(local, self._masters[name])

    def _master(self, local: torch.Tensor) -> torch.Tensor:
        """What the optimizer steps on: the weights themselves, or their copy in host memory."""
        if not self.offload:
            return local if type(local) is nn.Parameter else nn.Parameter(local)
        copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        put(copy, local)
        return nn.Parameter(copy)

    def _named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters by the causal LM's own names (without the root module's prefix), tied ones once."""
        root = self.module.get_submodule("model")
        return ((name, parameter) for name, parameter in root.named_parameters() if parameter.requires_grad)
