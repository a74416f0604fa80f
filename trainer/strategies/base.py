"""The strategy seam: how a global batch becomes one optimizer step, on however many processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainer.data.types import PackedBatch

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step.

    Attributes:
        grad_norm: 2-norm of the whole gradient before clipping; NaN or Inf when the step was skipped.
        skipped: the gradient was not finite, so nothing was changed.
        is_failure: the skip is not a loss scaler finding its scale.
    """

    grad_norm: float
    skipped: bool = False
    is_failure: bool = False


class Strategy(ABC):
    """Owns module, optimizer and whatever spreads them over processes.

    The seam stands around backward, accumulation and the optimizer's step together, because DeepSpeed's engine owns
    all three. The loop never asks which strategy it has.

    Attributes:
        module: root module; ``module(batch)`` returns the summed loss of a `PackedBatch`.
        device: where batches are wanted.
        rank: this process, from 0.
        world_size: number of processes.
    """

    module: nn.Module
    device: torch.device
    rank: int
    world_size: int

    @abstractmethod
    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        """Takes the module over (wraps, shards) and builds its optimizer."""

    @abstractmethod
    def forward_backward(self, micro_batches: Sequence[PackedBatch], num_trained_tokens: int) -> torch.Tensor:
        """Accumulates the gradient of ``sum of losses / num_trained_tokens`` over this process's micro-batches.

        Args:
            num_trained_tokens: of the whole global batch, over all processes and micro-batches.

        Returns:
            The global batch's summed loss, not divided; a scalar on the device, not synchronised.
        """

    @abstractmethod
    def step(self, lr: float, max_norm: float | None) -> StepResult:
        """Clips the gradient's norm to `max_norm`, steps the optimizer at `lr` and clears the gradients."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Forgets accumulated gradients (after a memory probe)."""

    @abstractmethod
    def allocate_optimizer(self) -> None:
        """Allocates moments that are missing, so that a memory probe or a restored checkpoint finds them."""

    @abstractmethod
    def state_dict(self) -> StateDict:
        """What training changes, flat: ``model.<name>`` and ``optim.<name>.<moment>``; live tensors or DTensors."""

    @abstractmethod
    def load_state_dict(self, state: StateDict) -> None:
        """Puts back what `state_dict` gave; the moments are allocated."""

    @abstractmethod
    def full_state_dict(self) -> StateDict:
        """Trained weights by name, whole; empty on ranks other than 0."""
