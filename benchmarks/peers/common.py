"""What the peers' processes share: the same random weights, the same documents, one meter. Run by speed.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shared import MASKED, PAD, read_documents
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback


def read_job() -> dict[str, Any]:
    """What speed.py asks of this process."""
    return json.loads(sys.argv[1])


def tell(result: dict[str, Any]) -> None:
    """Gives speed.py its figures: a line that begins with RESULT."""
    print("RESULT " + json.dumps(result), flush=True)


def write_weights(folder: Path, device: str) -> Path:
    """Random bfloat16 weights of the folder's shape, made on the device once for all peers; the folder they are in."""
    whole = folder / "weights"
    if not (whole / "tokenizer_config.json").exists():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        model.save_pretrained(whole, max_shard_size="5GB")
        AutoTokenizer.from_pretrained(folder).save_pretrained(whole)  # written last
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    return whole


def rows_of(folder: Path) -> dict[str, list[list[int]]]:
    """The documents as columns that TRL takes for tokenised: ``input_ids`` and ``completion_mask``."""
    documents = read_documents(folder)
    masks = [[0] * one.num_prompt + [1] * (len(one.ids) - one.num_prompt) for one in documents]
    return {"input_ids": [one.ids for one in documents], "completion_mask": masks}


def arguments_of(job: dict[str, Any]) -> dict[str, Any]:
    """`SFTConfig`'s, of both peers: as many packs a step as packtrain takes, and nothing beside training."""
    return {
        "output_dir": str(Path(job["work"], "peer")),
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["rows"] // job["micro_batch"],
        "max_length": job["pack_length"],
        "packing": True,
        "max_steps": job["steps"],
        "logging_steps": job["steps"],
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "bf16": True,
        "optim": "adamw_torch_fused",  # 36 ms for 7B weights on one H200, bitsandbytes' paged 8-bit AdamW 217
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


class Meter(TrainerCallback):
    """When each step ended and how many tokens the model saw in it. Never makes the host wait for the device.

    Args:
        embeddings: of the model; a hook sees what it is given, after collating and flattening.
    """

    def __init__(self, embeddings: torch.nn.Module, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._counts: list[torch.Tensor] = []
        self._ends: list[tuple[Any, int]] = []
        self._layout: list[int] = []
        embeddings.register_forward_pre_hook(self._see)

    def _see(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._layout = list(inputs[0].shape)
        self._counts.append((inputs[0] != PAD).sum())

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._end()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self._end()

    def _end(self) -> None:
        now: Any = time.perf_counter()
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._ends.append((now, len(self._counts)))

    def figures(self, attention: str = MASKED) -> dict[str, Any]:
        """Seconds and tokens of each step, forwards a step and their input's shape, peak memory, kind of attention."""
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds, tokens = [], []
        for (since, first), (until, last) in zip(self._ends, self._ends[1:], strict=False):
            seconds.append(since.elapsed_time(until) / 1000 if self._is_cuda else until - since)
            tokens.append(sum(int(count) for count in self._counts[first:last]))
        return {
            "step_seconds": seconds,
            "step_tokens": tokens,
            "num_forwards": len(self._counts) / len(seconds),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self._is_cuda else None,
            "layout": self._layout,
            "attention": attention,
        }
