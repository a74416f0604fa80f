"""How much each decoder layer computes again in backward: the dial ``train.recompute``, one level a layer. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from trainer.config import RecomputeLevel
from trainer.errors import UserError

LEVELS: tuple[RecomputeLevel, ...] = get_args(RecomputeLevel)  # from all kept to least kept


@dataclass(frozen=True)
class LayerLevels:
    """A level for each decoder layer, counted from the bottom: the one after the embeddings first."""

    of_layers: tuple[RecomputeLevel, ...]

    @classmethod
    def build(cls, counts: Mapping[RecomputeLevel, int]) -> LayerLevels:
        """From the bottom so many layers of each level, in the mapping's order."""
        return cls(tuple(itertools.chain.from_iterable([level] * count for level, count in counts.items())))

    @cached_property
    def counts(self) -> dict[RecomputeLevel, int]:
        """Number of layers of each level, in order from the bottom: what `build` takes."""
        return {level: len(list(group)) for level, group in itertools.groupby(self.of_layers)}

    def __str__(self) -> str:
        counts = self.counts
        if len(counts) == 1:
            return next(iter(counts))
        return ", then ".join(f"{level} in {count} layer{'s' * (count != 1)}" for level, count in counts.items())


def read_levels(recompute: RecomputeLevel | Mapping[RecomputeLevel, int], num_layers: int) -> LayerLevels:
    """The levels that ``train.recompute`` names, other than `auto`, for a model of `num_layers` layers.

    Raises:
        UserError: a mapping that does not add up to the model's layers.
    """
    if isinstance(recompute, str):
        return LayerLevels.build({recompute: num_layers})
    if (total := sum(recompute.values())) != num_layers:
        raise UserError(
            "train.recompute",
            f"{', '.join(f'{level}: {count}' for level, count in recompute.items())}, which adds up to {total} layers",
            f"numbers that add up to the model's {num_layers} layers",
            "mend the numbers, or take auto",
        )
    return LayerLevels.build(recompute)
