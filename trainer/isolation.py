"""A self-test before the first step: documents of a pack do not see each other, nor a token what comes after it.

The model as it will train (quantised, with adapters, cut by the strategy) computes three short documents twice. In
between some tokens of the middle one are changed, among them its last. Only that document's later positions may move,
and they have to: in what follows `x` is changed, `=` must be as it was, and `>` must not.

::

    = = = = = = | = = = = x x x x > > > x | = = = = =

Hidden states are compared, of which logits are a function position by position. Not seen by this test are position ids
that do not begin anew with each document: rotary embeddings know distances alone, so nothing would move.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.sampler import collate
from trainer.data.types import IGNORE_INDEX, PackedBatch
from trainer.errors import PacktrainError
from trainer.model.attention import FLASH4, VARLEN
from trainer.strategies.base import Strategy

logger = logging.getLogger(__name__)

LENGTHS = (37, 61, 45)  # odd ones, over the boundary of any kernel's tile
START, END = LENGTHS[0], LENGTHS[0] + LENGTHS[1]  # of the document that is changed
CHANGED = slice(START + 20, START + 40)
LAST = END - 1  # as a document that begins too early would see it alone
# Both forwards have the same shapes and so the same kernels: what was not changed should come out in the same bits.
# Kernels that add up in no fixed order may differ in the last ones; a leak is of the size of what is seen rightly.
TOLERANCE = 1e-3
FIXES = {FLASH4: "take model.attention: varlen", VARLEN: "take model.attention: sdpa"}


@dataclass(frozen=True)
class Movement:
    """How far hidden states moved: the largest 2-norm of a position's change.

    Attributes:
        others: of the other documents' positions.
        earlier: of those of the changed document before the change.
        later: of those after it whose own tokens were not changed.
        size: largest norm of a hidden state.
    """

    others: float
    earlier: float
    later: float
    size: float


@torch.no_grad()
def check_isolation(strategy: Strategy) -> None:
    """Refuses a prepared model whose attention mixes documents; called by all processes together.

    Draws no random number and leaves the module in the mode it was in.

    Raises:
        PacktrainError: on every process; a document moved another one, or earlier positions of its own, or nothing.
    """
    root: Any = strategy.module
    config = root.causal_lm.config
    was_training = root.training
    root.eval()
    try:
        with strategy.whole_weights():
            before, after = (
                root.hidden_states(batch.to(strategy.device)).float() for batch in _batches(config.vocab_size)
            )
    finally:
        root.train(was_training)
    for rank, movement in enumerate(strategy.processes.gather(_compare(before, after))):
        _judge(movement, config._attn_implementation, rank)
    logger.info("packed documents do not see each other (attention %s)", config._attn_implementation)


def _batches(vocab_size: int) -> tuple[PackedBatch, PackedBatch]:
    """The documents before and after the change."""
    generator = torch.Generator().manual_seed(0)  # training's own is left alone
    ids = torch.randint(vocab_size, (sum(LENGTHS),), generator=generator)
    changed = ids.clone()
    for part in (CHANGED, LAST):
        changed[part] = (ids[part] + vocab_size // 2) % vocab_size
    return _pack(ids), _pack(changed)


def _pack(ids: torch.Tensor) -> PackedBatch:
    return collate([[(part.tolist(), [IGNORE_INDEX] * len(part)) for part in ids.split(LENGTHS)]])


def _compare(before: torch.Tensor, after: torch.Tensor) -> Movement:
    """Of hidden states ``[tokens, hidden_size]``."""
    moved = (after - before).norm(dim=-1)
    others = torch.cat([moved[:START], moved[END:]])
    parts = (others, moved[START : CHANGED.start], moved[CHANGED.stop : LAST], before.norm(dim=-1))
    return Movement(*(part.max().item() for part in parts))


def _judge(movement: Movement, attention: str, rank: int) -> None:
    if not math.isfinite(movement.size + movement.others + movement.earlier + movement.later):
        raise PacktrainError(
            f"the model's hidden states are not finite on rank {rank}, before anything was trained\n"
            "  fix: with model.dtype: float16 take bfloat16; else check the weights under model.path"
        )
    allowed = TOLERANCE * movement.later
    own = f"its own later positions moved by {movement.later:.3g}"
    if movement.others > allowed:
        fault = f"lets packed documents see each other: one that was changed moved another by {movement.others:.3g}"
    elif movement.earlier > allowed:
        fault = f"is not causal: a document that was changed moved its earlier positions by {movement.earlier:.3g}"
    elif movement.later == 0.0:
        fault, own = "sees no earlier token: a document that was changed", "did not move at its later positions"
    else:
        return
    fix = (
        "take model.attention: sdpa"
        if attention in (FLASH4, VARLEN)
        else "install torch and transformers as setup.cfg asks"
    )
    raise PacktrainError(
        f"attention {attention} {fault}, {own} (rank {rank}, self-test before training)\n"
        f"  fix: {fix}; nothing was trained. Report it with the recipe and `packtrain doctor`"
    )
