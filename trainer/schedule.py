"""Learning rate as a function of the step; the plateau schedule also listens to the validation loss."""

from __future__ import annotations

import logging
import math
from typing import Any

from trainer.config import OptimConfig, ScheduleConfig

logger = logging.getLogger(__name__)


class Schedule:
    """Learning rate over a run: linear warm-up to the peak, then the recipe's shape.

    Args:
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, schedule: ScheduleConfig, optim: OptimConfig, num_steps: int) -> None:
        self.config, self.peak, self.num_steps = schedule, optim.lr, num_steps
        self.warmup_steps = round(schedule.warmup * num_steps) if schedule.warmup < 1 else int(schedule.warmup)
        if self.warmup_steps >= num_steps:
            text = "schedule.warmup is %d steps and the run has %d: the learning rate never gets past its warm-up"
            logger.warning(text, self.warmup_steps, num_steps)
        self.reductions = 0
        self.best_loss = math.inf
        self.bad_evaluations = 0

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        floor = self.config.min_lr
        return self.peak * (floor + (1 - floor) * self._shape(step))

    def observe(self, validation_loss: float) -> None:
        """Tells the plateau schedule how an evaluation went; the others ignore it."""
        if self.config.name != "plateau":
            return
        if validation_loss < self.best_loss:
            self.best_loss, self.bad_evaluations = validation_loss, 0
            return
        self.bad_evaluations += 1
        if self.bad_evaluations > self.config.patience:
            self.reductions, self.bad_evaluations = self.reductions + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What `lr` depends on beside the step."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"reductions": self.reductions, "best_loss": best, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.reductions, self.bad_evaluations = state["reductions"], state["bad_evaluations"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]

    def _shape(self, step: int) -> float:
        """Share of the way from floor to peak, 1 down to 0 at the last step + 1 (so the last step still trains)."""
        remaining = self.num_steps + 1 - step
        after_warmup = max(1, self.num_steps + 1 - self.warmup_steps)
        match self.config.name:
            case "constant":
                return 1.0
            case "plateau":
                return self.config.factor**self.reductions
            case "linear":
                return max(0.0, remaining / after_warmup)
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(1.0, 1 - remaining / after_warmup)))
            case "wsd":  # warm-up, stable, decay: arXiv:2404.06395
                return max(0.0, min(1.0, remaining / max(1, round(self.config.decay * self.num_steps))))
