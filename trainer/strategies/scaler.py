"""Dynamic loss scaling, which float16's narrow range needs (arXiv:1710.03740)."""

from __future__ import annotations

MIN_SCALE = 1.0  # below it an overflow is the model's, not the scale's
MAX_SCALE = 2.0**24
GROWTH_INTERVAL = 2000  # finite steps in a row after which the scale doubles


class LossScaler:
    """The factor a loss is multiplied by before backward; 1 throughout when not `enabled`.

    Its decisions follow from the gradient's norm over all processes, so they are the same on every process.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = 2.0**16 if enabled else 1.0
        self.good_steps = 0

    @property
    def at_minimum(self) -> bool:
        """Whether a gradient that is not finite cannot be the scale's fault."""
        return self.scale <= MIN_SCALE

    def update(self, overflow: bool) -> None:
        """Halves the scale after an overflow, doubles it after many good steps."""
        if not self.enabled:
            return
        if overflow:
            self.scale, self.good_steps = max(MIN_SCALE, self.scale / 2), 0
            return
        self.good_steps += 1
        if self.good_steps >= GROWTH_INTERVAL:
            self.scale, self.good_steps = min(MAX_SCALE, self.scale * 2), 0
