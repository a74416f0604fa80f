"""What ``vllm serve`` is told of a model, beside its address.

All options are in vLLM 0.25.1 to 0.32 (``vllm/engine/arg_utils.py`` and the frontend's ``cli_args.py``).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.servable import Servable


def serving_options(servable: Servable, name: str, max_length: int | None) -> list[str]:
    """Options for a whole model, or for an adapter unmerged on its base.

    Args:
        name: the model's name in requests; an adapter's base is NAME-base.
        max_length: longest prompt and answer together, in tokens; None leaves it to the model's config. Not the
            recipe's ``pack_length``: training on short rows does not take away what the base can do beyond them.
    """
    options = ["--served-model-name", f"{name}-base" if servable.adapter else name, "--dtype", servable.dtype]
    options += ["--revision", servable.revision] if servable.revision else []
    options += ["--tokenizer", servable.tokenizer] if servable.tokenizer != servable.model else []
    options += ["--generation-config", servable.generation_config] if servable.generation_config else []
    if servable.adapter:
        adapter = json.dumps({"name": name, "path": servable.adapter})  # NAME=PATH would not take a path with = or ,
        options += ["--enable-lora", "--max-lora-rank", str(servable.max_rank), "--lora-modules", adapter]
    options += ["--max-model-len", str(max_length)] if max_length is not None else []
    return options + _memory_options()


def _memory_options() -> list[str]:
    """For a build for CPUs, whose own share is more than a host in use has; one after -- comes last and counts."""
    from trainer.servable import is_built_for_cpus, share_of_host_memory

    return ["--gpu-memory-utilization", str(share_of_host_memory())] if is_built_for_cpus() else []


def choose_num_gpus(shape: dict[str, Any], asked: int | None, visible: int) -> int:
    """GPUs to cut the model over: as many as asked for, else of those there are as many as divide it.

    Raises:
        UserError: more than there are, or the model does not divide by them.
    """
    from trainer.servable import gpu_counts, num_kv_heads

    fitting = gpu_counts(shape, visible or max(1, asked or 1))  # a login node has none, and may still print the command
    if asked is None:
        return fitting[-1]
    if asked not in fitting:
        heads = f"{shape['num_attention_heads']} heads on {num_kv_heads(shape)} of keys and values"
        found = f"{asked}; this host has {visible}, and the model has {heads}"
        raise UserError("--gpus", found, ", ".join(map(str, fitting)), "choose one of these")
    return asked
