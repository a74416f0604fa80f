"""One process, one device: plain autograd. The reference the other strategies are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from trainer.data.types import PackedBatch
from trainer.optim import init_optimizer_state, load_optimizer_state, optimizer_state
from trainer.strategies.base import StateDict, StepResult, Strategy

# Below this scale an overflow is the model's, not the scaler's.
MIN_LOSS_SCALE = 1.0


class SingleProcess(Strategy):
    """Trains on `device` alone.

    Args:
        device: where the module lives.
        loss_scaling: scale the loss dynamically; float16 needs it.
    """

    rank, world_size = 0, 1

    def __init__(self, device: torch.device, loss_scaling: bool) -> None:
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)

    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.module = module
        self.optimizer = build_optimizer(module)

    def forward_backward(self, micro_batches: Sequence[PackedBatch], num_trained_tokens: int) -> torch.Tensor:
        loss_sum = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self.module(batch.to(self.device))
            self.scaler.scale(loss / max(1, num_trained_tokens)).backward()
            loss_sum += loss.detach()
        return loss_sum

    def step(self, lr: float, max_norm: float | None) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained(), max_norm or math.inf).item()
        skipped = not math.isfinite(norm)
        at_minimum = not self.scaler.is_enabled() or self.scaler.get_scale() <= MIN_LOSS_SCALE
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_scale()
        return StepResult(norm, skipped, is_failure=skipped and at_minimum)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def allocate_optimizer(self) -> None:
        init_optimizer_state(self.optimizer)

    def state_dict(self) -> StateDict:
        self.allocate_optimizer()  # there are none yet when every step so far was skipped, and a resume asks for them
        state = {f"model.{name}": parameter.detach() for name, parameter in self._named_trained()}
        state |= optimizer_state(self.optimizer, self._named_trained())
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state["scaler.scale"] = torch.tensor(scaler["scale"])
            state["scaler.growth_tracker"] = torch.tensor(scaler["_growth_tracker"])
        return state

    def load_state_dict(self, state: StateDict) -> None:
        with torch.no_grad():
            for name, parameter in self._named_trained():
                parameter.copy_(state[f"model.{name}"])
        load_optimizer_state(self.optimizer, self._named_trained(), state)
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            scaler |= {"scale": state["scaler.scale"].item(), "_growth_tracker": int(state["scaler.growth_tracker"])}
            self.scaler.load_state_dict(scaler)

    def full_state_dict(self) -> StateDict:
        return {name: parameter.detach() for name, parameter in self._named_trained()}

    def _update_scale(self) -> None:
        if not self.scaler.is_enabled():
            return
        self.scaler.update()
        if self.scaler.get_scale() < MIN_LOSS_SCALE:
            self.scaler.update(MIN_LOSS_SCALE)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._named_trained()]

    def _named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters by the causal LM's own names (without the root module's prefix), tied ones once."""
        root = self.module.get_submodule("model")
        return ((name, parameter) for name, parameter in root.named_parameters() if parameter.requires_grad)
