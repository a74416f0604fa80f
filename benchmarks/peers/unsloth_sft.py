"""Unsloth with its own checkpointing, through TRL's SFTTrainer as its guides show. Run by speed.py."""

from __future__ import annotations

import os

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
import unsloth  # noqa: F401, I001  (patches transformers and TRL, so before them)

import importlib.metadata
from pathlib import Path

import torch
from common import Meter, arguments_of, read_job, rows_of, tell, write_weights
from datasets import Dataset
from shared import ADAPTER_ALPHA, ADAPTER_RANK, LINEARS, MASKED
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

FLASH = {"flash-attn", "xformers"}  # with one of them its documents need no mask


def main() -> None:
    """Trains as the job says and tells what it measured."""
    job = read_job()
    folder = Path(job["work"])
    weights = write_weights(folder, job["device"])
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(weights),
        max_seq_length=job["pack_length"],
        dtype=torch.bfloat16,
        load_in_4bit=job["method"] == "qlora",
        full_finetuning=job["method"] == "full",
    )
    checkpointing = "unsloth" if job["recompute"] else False
    if job["method"] != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=ADAPTER_RANK,
            lora_alpha=ADAPTER_ALPHA,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            target_modules=LINEARS,
        )
    arguments = SFTConfig(**arguments_of(job))
    meter = Meter(model.get_input_embeddings(), job["device"])
    rows = {"input_ids": rows_of(folder)["input_ids"]}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(rows),
        args=arguments,
        callbacks=[meter],
    )
    loss = trainer.train().training_loss
    batch = f"{arguments.per_device_train_batch_size} x {arguments.gradient_accumulation_steps} packs"
    recompute = "its checkpointing" if checkpointing else "no checkpointing"
    settings = f"its packing, loss on all tokens, {recompute}, {batch}, {arguments_of(job)['optim']}, bf16"
    installed = {one.name.lower().replace("_", "-") for one in importlib.metadata.distributions()}
    attention = ", ".join(sorted(FLASH & installed)) or MASKED
    tell({**meter.figures(attention), "loss": loss, "settings": settings})


if __name__ == "__main__":
    main()
