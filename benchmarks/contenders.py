"""Who is measured by speed.py, in which settings, and what each setting says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PACKTRAIN, HARDWARE = "packtrain", "hardware"


@dataclass(frozen=True)
class Peer:
    """Another trainer as it is run here.

    Attributes:
        name: in the table.
        script: under ``peers/``.
        packages: without which it cannot run.
        recompute: activations are computed again in the backward (its gradient checkpointing).
        accumulate: one pack a forward and as many forwards as packs; else all packs of a step at once.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    liger: bool = False
    recompute: bool = True
    accumulate: bool = False


@dataclass(frozen=True)
class Setting:
    """A kind of training.

    Attributes:
        measures: what its figures say, for the table.
        method: full, lora or qlora; of the recipe ``recipes/llama2-7b-METHOD.yaml`` and of the peers.
        overrides: dotted fields laid over packtrain's recipe.
        weights: dtype of the trained weights of a full fine-tune.
        budget_gib: GPU memory that it has to do with.
    """

    measures: str
    method: str
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str = "float32"
    budget_gib: float | None = None


PEERS = {
    "trl": Peer("TRL", "trl_sft.py", ("trl",)),
    "trl-liger": Peer("TRL + Liger", "trl_sft.py", ("trl", "liger-kernel"), liger=True),
    "trl-liger-kept": Peer(
        "TRL + Liger, no checkpointing", "trl_sft.py", ("trl", "liger-kernel"), liger=True, recompute=False
    ),
    "trl-liger-1": Peer(
        "TRL + Liger, a pack a forward", "trl_sft.py", ("trl", "liger-kernel"), liger=True, accumulate=True
    ),
    "trl-liger-kept-1": Peer(
        "TRL + Liger, no checkpointing, a pack a forward",
        "trl_sft.py",
        ("trl", "liger-kernel"),
        liger=True,
        recompute=False,
        accumulate=True,
    ),
    "unsloth": Peer("Unsloth", "unsloth_sft.py", ("unsloth", "trl")),
    "unsloth-1": Peer("Unsloth, a pack a forward", "unsloth_sft.py", ("unsloth", "trl"), accumulate=True),
}
SETTINGS = {
    "qlora": Setting(
        "adapters of rank 16 on all linear layers, over an NF4 base; 16-bit matmuls, all of the GPU's memory", "qlora"
    ),
    "qlora-24gib": Setting(
        "the same within the memory of a 24 GiB GPU, as `packtrain plan` chooses for one",
        "qlora",
        overrides={"train.micro_batch": 1, "train.recompute": "none"},
        budget_gib=24.0,
    ),
    "lora": Setting("adapters of rank 16 on all linear layers, over a bfloat16 base", "lora"),
    "full": Setting(
        "every weight trained, kept in bfloat16, and so are AdamW's moments",
        "full",
        overrides={"train.param_dtype": "bfloat16"},
        weights="bfloat16",
    ),
    "full-float32": Setting("every weight trained, kept in float32 with bfloat16 matmuls, and AdamW", "full"),
}


def label_of(contender: str) -> str:
    """A contender's name in a table."""
    return PEERS[contender].name if contender in PEERS else contender
