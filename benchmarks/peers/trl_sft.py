"""TRL's SFTTrainer, with or without Liger's kernels and checkpointing. Run by speed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import Meter, arguments_of, read_job, rows_of, tell, write_weights
from datasets import Dataset
from peft import LoraConfig
from shared import ADAPTER_ALPHA, ADAPTER_RANK
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Trains as the job says and tells what it measured."""
    job = read_job()
    folder = Path(job["work"])
    weights = write_weights(folder, job["device"])
    model = load(weights, job)
    adapter = LoraConfig(
        r=ADAPTER_RANK, lora_alpha=ADAPTER_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = SFTConfig(
        **arguments_of(job),
        packing_strategy="bfd",
        completion_only_loss=True,
        gradient_checkpointing=job["recompute"],
        use_liger_kernel=job["liger"],
        use_cpu=job["device"] == "cpu",
    )
    meter = Meter(model.get_input_embeddings(), job["device"])
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows_of(folder)),
        processing_class=AutoTokenizer.from_pretrained(weights),
        peft_config=None if job["method"] == "full" else adapter,
        callbacks=[meter],
    )
    loss = trainer.train().training_loss
    tell({**meter.figures(), "loss": loss, "settings": describe(arguments, job)})


def load(weights: Path, job: dict[str, Any]) -> Any:
    """The model as a user of TRL loads it: a frozen base in bfloat16, trained weights in float32 under autocast."""
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    dtype = torch.float32 if job["method"] == "full" and job["weights"] == "float32" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(
        weights,
        quantization_config=quantized if job["method"] == "qlora" else None,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": 0 if job["device"] == "cuda" else "cpu"},
    )


def describe(arguments: SFTConfig, job: dict[str, Any]) -> str:
    """The settings that a reader needs to run it again."""
    kernels = "Liger" if arguments.use_liger_kernel else "no Liger"
    recompute = "gradient checkpointing" if arguments.gradient_checkpointing else "no gradient checkpointing"
    batch = f"{arguments.per_device_train_batch_size} x {arguments.gradient_accumulation_steps} packs"
    weights = f"{job['weights']} weights, " if job["method"] == "full" else ""
    return f"bfd packing, sdpa, {kernels}, {recompute}, {batch}, {arguments.optim.value}, {weights}bf16 autocast"


if __name__ == "__main__":
    main()
