"""Loss curves of packtrain's fast paths beside plain transformers and PEFT in float32.

    python benchmarks/loss_curve.py RECIPE --paths bfloat16,float8 --steps 200 --results curves.jsonl

The reference is one process of plain modules: a block mask that tells documents apart, `F.cross_entropy` over whole
logits, torch's AdamW, float32 throughout (a base that the recipe quantises is what bitsandbytes quantises and
dequantises). It begins with the same adapter and sees the same packs in the same order. Each path is a run of
`packtrain train` on the recipe with the path's fields over it, all but `flash4` with torch's attention. A recipe that
says what the reference does not do is refused. Losses jump from step to step as the data do, alike for
all; so what is told is the largest relative difference of their means over `WINDOW` steps. Random weights have next to
nothing to learn by an adapter: take a model that was trained. Dotted options go to the recipe.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from trainer.config import RunConfig
from trainer.data.prepare import load_splits
from trainer.data.sampler import GlobalBatchSampler, collate
from trainer.data.types import PackedBatch
from trainer.errors import UserError
from trainer.model import flash4
from trainer.model.build import build_model
from trainer.model.lora import ADAPTER
from trainer.model.tokenizer import load_tokenizer
from trainer.recipe import load_recipe, split_overrides
from trainer.schedule import Schedule

FLASH4 = "flash4"
PATHS: dict[str, dict[str, str]] = {
    "bfloat16": {},
    FLASH4: {},
    "mlp": {"train.recompute": "mlp"},
    "full": {"train.recompute": "full"},
    "float8": {"train.float8": "true"},
    "kept": {"train.keep_in_float8": "true", "train.recompute": "norms"},
}
WINDOW = 20
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Prints a line of json for the reference and each path, then a table."""
    overrides, rest = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="full, or an adapter on all linear layers with a whole alpha")
    parser.add_argument("--paths", default="bfloat16,float8", help=f"by commas: {', '.join(PATHS)}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--results", type=Path, help="append the curves to this file")
    arguments = parser.parse_args(rest)
    logging.basicConfig(level=logging.WARNING)
    overrides |= {
        "train.max_steps": str(arguments.steps),
        "train.device": "cpu" if arguments.device == "cpu" else "auto",
    }
    try:
        runs = plan_runs(arguments.recipe, arguments.paths.split(","), overrides, arguments.device)
        config = load_recipe(arguments.recipe, overrides)
        refuse_what_the_reference_lacks(config)
    except UserError as error:
        sys.exit(str(error))
    curves = {"reference": train_reference(config, torch.device(arguments.device))}
    tell("reference", curves["reference"], arguments.results)
    torch.cuda.empty_cache()
    for path, fields in runs.items():
        curves[path] = train(arguments.recipe, fields)
        tell(path, curves[path], arguments.results)
    print_table(curves)


def plan_runs(recipe: Path, paths: list[str], overrides: dict[str, str], device: str) -> dict[str, dict[str, str]]:
    """What each path lays over the recipe.

    Raises:
        UserError: no such path, or the recipe does not go with it, or this machine.
    """
    runs = {}
    for path in paths:
        if path not in PATHS:
            raise UserError("--paths", repr(path), ", ".join(PATHS))
        if path == FLASH4 and (device == "cpu" or not flash4.is_installed()):
            raise UserError("--paths", f"{FLASH4} on this device", f"a GPU, and {flash4.PACKAGE} installed")
        fields = overrides | PATHS[path]
        can_varlen = device == "cuda" and load_recipe(recipe, fields).compute_dtype != "float32"
        fields["model.attention"] = FLASH4 if path == FLASH4 else "varlen" if can_varlen else "auto"
        load_recipe(recipe, fields)
        runs[path] = fields
    return runs


def refuse_what_the_reference_lacks(config: RunConfig) -> None:
    """Raises UserError where the recipe says what the reference leaves out: the curves would differ for that."""
    wanted: dict[str, tuple[Any, Any]] = {
        "model.init": (config.model.init, "pretrained"),
        "model.revision": (config.model.revision, None),
        "optim.name": (config.optim.name, "adamw"),
        "eval.early_stopping": (config.eval.early_stopping, None),
    }
    if config.schedule.name == "plateau":
        raise UserError("schedule.name", "plateau", "a schedule that knows the rate of each step beforehand")
    if config.quantization and config.quantization.type == "int8":
        raise UserError("quantization.type", "int8", "nf4 or fp4")
    if adapter := config.adapter:
        targets = "all-linear" if set(adapter.targets) == set(LINEARS) else adapter.targets
        wanted |= {
            "adapter.targets": (targets, "all-linear"),
            "adapter.alpha": (adapter.alpha, float(int(adapter.alpha))),
            "adapter.dropout": (adapter.dropout, 0.0),
            "adapter.rslora": (adapter.rslora, False),
            "adapter.dora": (adapter.dora, False),
            "adapter.modules_to_save": (adapter.modules_to_save, []),
        }
    for field, (found, allowed) in wanted.items():
        if found != allowed:
            fix = f"--{field}={json.dumps(allowed)} over the recipe, as the reference does nothing else"
            raise UserError(field, str(found), json.dumps(allowed), fix)


def train(recipe: Path, overrides: dict[str, str]) -> list[float]:
    """The losses of a run."""
    switches = {"eval.samples": "[]", "checkpoint.keep": "1", "export.merge": "false", "export.verify": "false"}
    options = [f"--{name}={value}" for name, value in {**overrides, **switches}.items()]
    with tempfile.TemporaryDirectory(prefix="packtrain-curve-") as folder:
        command = [sys.executable, "-m", "launch.cli", "train", str(recipe), "--run-dir", folder, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        metrics = Path(folder, "metrics.jsonl")
        lines = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else [])
        losses = [line["loss"] for line in lines if line["kind"] == "step"]
    if done.returncode:
        sys.exit(f"packtrain train ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return losses


def train_reference(config: RunConfig, device: torch.device) -> list[float]:
    """The losses of plain modules on the same packs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    packs = load_splits(config, load_tokenizer(config.model), lambda: None).train
    num_steps = config.train.max_steps or 0
    epochs = num_steps * config.packs_per_step / len(packs)
    sampler = GlobalBatchSampler(len(packs), config.packs_per_step, epochs, config.train.seed)
    model = build_reference(config, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=config.optim.betas, eps=config.optim.eps
    )
    schedule, losses = Schedule(config.schedule, config.optim, num_steps), []
    for step in range(num_steps):
        batches = [collate([packs[index]]).to(device) for index in sampler.batch(step)]
        num_trained = sum(batch.num_trained_tokens for batch in batches)
        loss_sum = 0.0
        for batch in batches:
            loss = summed_loss(model, batch)
            (loss / num_trained).backward()
            loss_sum += loss.item()
        if config.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / num_trained)
    return losses


def build_reference(config: RunConfig, device: torch.device) -> Any:
    """The base in float32, through 4 bit and back where the recipe quantises, with PEFT's adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=getattr(torch, config.model.dtype), attn_implementation="sdpa"
    )
    model.to(device)
    if config.quantization:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in LINEARS:
                codes, state = quantize_4bit(
                    module.weight.data, quant_type=config.quantization.type,
                    compress_statistics=config.quantization.double_quant,
                )  # fmt: skip
                module.weight.data = dequantize_4bit(codes, state)
    model = model.float()
    if config.adapter:
        adapter = LoraConfig(r=config.adapter.r, lora_alpha=int(config.adapter.alpha), target_modules=LINEARS)
        model = get_peft_model(model, adapter, adapter_name=ADAPTER)
        parameters, first = dict(model.named_parameters()), build_model(config, device).adapter_init
        for name, value in first.items():
            parameters[name].data.copy_(value)
    return model.train()


def summed_loss(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Of the trained tokens of a pack, each document seeing itself alone."""
    number = torch.repeat_interleave(
        torch.arange(len(batch.cu_seqlens) - 1, device=batch.input_ids.device), batch.cu_seqlens.diff().long()
    )
    visible = (number[:, None] == number[None]).tril()
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=visible[None, None], use_cache=False
    ).logits[0, :-1]
    return F.cross_entropy(logits, batch.labels[0, 1:], reduction="sum")


def tell(path: str, losses: list[float], results: Path | None) -> None:
    """A line of json."""
    line = json.dumps({"path": path, "losses": [round(loss, 5) for loss in losses]})
    print(line[:160], flush=True)
    if results:
        with results.open("a") as file:
            file.write(line + "\n")


def print_table(curves: dict[str, list[float]]) -> None:
    """Markdown."""
    reference = curves["reference"]
    heads = (
        "path",
        "steps",
        "first loss",
        f"mean of the last {WINDOW}",
        f"largest difference, means of {WINDOW} steps",
    )
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for path, losses in curves.items():
        starts = range(max(1, len(reference) - WINDOW + 1))
        apart = max(abs(sum(losses[at : at + WINDOW]) / sum(reference[at : at + WINDOW]) - 1) for at in starts)
        last = losses[-WINDOW:]
        print(f"| {path} | {len(losses)} | {losses[0]:.4f} | {sum(last) / len(last):.4f} | {apart:.3%} |")


if __name__ == "__main__":
    main()
