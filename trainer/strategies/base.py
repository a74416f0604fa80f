"""The strategy seam: how a global batch becomes one optimizer step, on however many processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from trainer.data.types import PackedBatch
from trainer.processes import Processes
from trainer.readings import Figure

StateDict = dict[str, torch.Tensor]


class Checkpoint(Protocol):
    """A committed checkpoint, to be read from."""

    @property
    def names(self) -> Collection[str]:
        """Keys that were saved: ``model.<name>``, ``optim.<name>.<moment>`` ..."""
        ...

    def load(self, state: StateDict) -> None:
        """Fills tensors and DTensors of `state` in place, each process its own part; on all processes together."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU; by this process alone."""
        ...


class StepResult:
    """What became of one optimizer step; who asks waits for the device.

    Args:
        norm: 2-norm of the whole gradient before clipping; NaN or Inf where the step was skipped.
        counts: a skip is not a loss scaler finding its scale.
    """

    def __init__(self, norm: float | torch.Tensor, counts: bool = True) -> None:
        self._norm, self._counts = Figure(norm) if isinstance(norm, torch.Tensor) else norm, counts

    @cached_property
    def grad_norm(self) -> float:
        """`norm`, on the host."""
        return float(self._norm)

    @property
    def skipped(self) -> bool:
        """The gradient was not finite, so nothing was changed."""
        return not math.isfinite(self.grad_norm)

    @property
    def is_failure(self) -> bool:
        """It was skipped for what the model computed."""
        return self.skipped and self._counts


BuildOptimizer = Callable[..., torch.optim.Optimizer]  # (named tensors, min_8bit_size), as `optim.build_optimizer`
# Of the quantised bytes of a module, as `trainer.model.quantized.fingerprint`; None where a base has none.
Fingerprint = Callable[..., str] | None


class Strategy(ABC):
    """Owns module, optimizer and whatever spreads them over processes.

    The seam stands around backward, accumulation and the optimizer's step together, because DeepSpeed's engine owns
    all three. The loop never asks which strategy it has.

    A module comes without storage (on the meta device), so that no process ever holds more of it than its share and
    one layer: `shard` lays the module out, `place` is given every tensor whole and keeps this process's part, and
    `prepare` makes it ready to train.

    Attributes:
        name: as `strategy.kind` has it.
        module: root module, a `trainer.loss.PackedCausalLM`; ``module(batch)`` returns the summed loss of a
            `PackedBatch`.
        device: where batches are wanted.
        processes: this process among the others.
        can_begin_anew: whether a `forward_backward` that failed may be called again once its gradients are discarded.
            Among several processes the others may wait in a collective, and nobody can call them back.
    """

    name: str
    can_begin_anew = False
    module: nn.Module
    device: torch.device
    processes: Processes

    @abstractmethod
    def shard(self, module: nn.Module) -> None:
        """Takes over the root module, whose parameters are on the meta device, dtype and `requires_grad` final."""

    @abstractmethod
    def place(self, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        """Gives parameter `leaf` of module `owner` its value; called once for each, on every process in one order.

        Args:
            whole: the full tensor, equal on every process; on `device` or the CPU, cast to the parameter's dtype here.
        """

    @abstractmethod
    def prepare(self, build_optimizer: BuildOptimizer) -> None:
        """Wraps what has to be wrapped and builds the optimizer; every parameter has been placed.

        Args:
            build_optimizer: makes the recipe's optimizer of named tensors to step on (shards, where there are).
        """

    @abstractmethod
    def forward_backward(
        self,
        micro_batches: Sequence[PackedBatch],
        num_trained_tokens: int,
        on_micro_batch: Callable[[int], None] = lambda index: None,
    ) -> torch.Tensor:
        """Accumulates the gradient of ``sum of losses / num_trained_tokens`` over all processes' micro-batches.

        Before each micro-batch torch's generators are seeded with its `PackedBatch.seed`, so that dropout is a
        function of the sample and not of the process that computes it.

        Args:
            micro_batches: this process's; as many on every process.
            num_trained_tokens: of the whole global batch, over all processes and micro-batches.
            on_micro_batch: called with the index of each before it is computed.

        Returns:
            The global batch's summed loss, not divided; a scalar on the device, not synchronised.
        """

    @abstractmethod
    def step(self, lr: float, max_norm: float | None) -> StepResult:
        """Clips the gradient's norm to `max_norm`, steps the optimizer at `lr` and clears the gradients.

        Wherever the optimizer can skip a step by itself, the host does not wait for the device.
        """

    @abstractmethod
    def discard_gradients(self) -> None:
        """Forgets accumulated gradients (after a memory probe)."""

    @abstractmethod
    def allocate_optimizer(self) -> int:
        """Allocates moments that are missing, so that a memory probe or a restored checkpoint finds them.

        Returns:
            Bytes of those that are paged, which torch does not count as allocated.
        """

    @abstractmethod
    def state_dict(self) -> StateDict:
        """What training changes, flat: ``model.<name>`` and ``optim.<name>.<moment>``; live tensors or DTensors."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts back weights and moments of a checkpoint, whatever number of processes and kind of strategy wrote it.

        Raises:
            PacktrainError: it holds other weights, or moments that cannot become this strategy's.
        """

    @abstractmethod
    def fingerprint(self) -> str | None:
        """`trainer.model.quantized.fingerprint` of the bytes as they lie now, over all processes; None without."""

    @abstractmethod
    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, modules below the root may be called without it (generation), on all processes alike."""
