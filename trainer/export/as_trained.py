"""The model that a merged one is held against: its base and adapter through PEFT, sharing no arithmetic with the merge.

bitsandbytes' own functions read the quantised base here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from trainer.checkpoint.base_location import locate_base
from trainer.checkpoint.layout import MANIFEST, hash_file, read_manifest
from trainer.checkpoint.result import Result, check_files, enclosing_run, find_result
from trainer.config import ModelConfig, QuantizationConfig, RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.base import EMBEDDING, HEAD, BaseTensors, check_config
from trainer.export.streaming import build_empty
from trainer.export.verify_files import read_exported_config
from trainer.generate import default_device
from trainer.model.adapter_files import ADAPTER_WEIGHTS, check_adapter_config
from trainer.model.nf4 import BLOCK_SIZE, SCALES_PER_GROUP, dynamic_map
from trainer.model.quantized import format_of

KEYS = {"model", "seed", "dtype", "quantization", "adapter", "recipe", "base", "merged_onto"}  # of a merge's manifest


class AsTrained:
    """Base and adapter of a merged folder, found by its manifest.

    Attributes:
        peft_model: without storage; `read` gives its parameters.
        adapter_tensors: the adapter's file.
        config: of the merged model.
        dtype: of the merged model, and of the frozen weights in training.

    Raises:
        UserError: the adapter is gone.
        PacktrainError: adapter or base are not those that were merged.
    """

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.folder, self.manifest, self._look = folder, read_manifest(folder), check
        if missing := sorted(KEYS - self.manifest.keys()):
            raise PacktrainError(f"{folder / MANIFEST}: {', '.join(missing)} missing\n  fix: merge again")
        self.device = default_device()
        self.result = find_adapter(folder, self.manifest)
        self.base = BaseTensors(self._locate_base(), self.manifest["seed"])
        self._check_base()
        self.adapter_tensors = load_file(self.result.folder / ADAPTER_WEIGHTS)
        self.dtype = getattr(torch, self.manifest["dtype"])
        self.config = read_exported_config(folder)
        self.peft_model = self._build_peft()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Of the base trained on, as the manifest tells that of the one merged onto."""
        config = self.result.config
        if config is None or config.quantization is None:
            return None
        return {**config.quantization.model_dump(mode="json"), "compute_dtype": config.compute_dtype}

    def read(self, name: str, on_own_base: bool = False) -> torch.Tensor:
        """A parameter of the PEFT model by its name there, in float32: from the adapter's file or the base.

        Args:
            on_own_base: of the base trained on, else of the one merged onto.
        """
        self._look()
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        key = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        is_original = ".original_module." in name
        if key in self.adapter_tensors and not is_original:
            return self.adapter_tensors[key].to(self.device, torch.float32)
        tensor = base_name(key)
        source = EMBEDDING if tensor == HEAD and HEAD not in self.base.shapes else tensor
        weight = self.base.read(source, self.device).to(self.dtype)
        quantization = self.quantization if on_own_base else self.manifest["quantization"]
        if quantization and tensor.removesuffix(".weight") in self.base.linears:
            weight = _dequantized(weight, quantization)
        return weight.to(torch.float32)

    def _locate_base(self) -> ModelConfig:
        model = ModelConfig.model_validate(self.manifest["model"])
        return model if Path(model.path).exists() else locate_base(self.result)

    def _check_base(self) -> None:
        check_config(self.base.model, self.result)
        found, expected = self.base.content_hash(self._look), self.manifest["base"]["content_hash"]
        if found != expected:
            raise PacktrainError(
                f"{self.base.model.path}: the base has content hash {found}, and was merged with {expected}\n"
                "  fix: put the base back as it was, or merge again"
            )

    def _build_peft(self) -> Any:
        shape = copy.deepcopy(self.base.config)
        shape.vocab_size = self.config.vocab_size
        return build_peft(shape, self.result.folder)


def find_adapter(folder: Path, manifest: dict[str, Any]) -> Result:
    """The adapter that a merge's manifest names, or where it moved to with its run.

    Raises:
        UserError: it is gone, or its files are not as written.
        PacktrainError: it is not the one that was merged.
    """
    record, run = manifest["adapter"], enclosing_run(folder)
    place = Path(record["path"])
    if run and record["in_run"] and (run.path / record["in_run"]).is_dir():
        place = run.path / record["in_run"]
    if not (place / ADAPTER_WEIGHTS).exists():
        raise _gone(folder, place, record["in_run"])
    for name, expected in record["files"].items():
        if hash_file(place / name) != expected:
            raise PacktrainError(f"{place / name} is not the file that was merged\n  fix: merge again")
    result = replace(find_result(place), base=manifest["base"])
    if manifest["recipe"]:
        result = replace(result, config=RunConfig.model_validate(manifest["recipe"]))
    check_files(result)
    check_adapter_config(place, result.adapter_recipe)
    return result


def _gone(folder: Path, place: Path, in_run: str | None) -> UserError:
    found = f"its adapter is not at {place} any more"
    if not in_run or not in_run.startswith("checkpoints/"):
        return UserError(str(folder), found, fix="put it back")
    run = place.parents[2]
    found += ": the run has gone on since, and that checkpoint made room for newer ones"
    fix = f"nothing proves this folder any more; make one of what the run has now: `packtrain merge {run} --out DIR`"
    return UserError(str(folder), found, fix=fix)


def build_peft(config: Any, adapter: Path) -> Any:
    """PEFT's own reading of an adapter's configuration, around a model without storage."""
    peft_config = PeftConfig.from_pretrained(str(adapter))
    peft_config.inference_mode = True
    return PeftModel(build_empty(config), peft_config, low_cpu_mem_usage=True).eval()


def base_name(name: str) -> str:
    """A PEFT module's or parameter's name in the plain model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def _dequantized(weight: torch.Tensor, quantization: dict[str, Any]) -> torch.Tensor:
    """The weight after quantisation: the training's bytes, handed to bitsandbytes' own functions in its own layout."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    config, dtype = QuantizationConfig.model_validate(quantization), getattr(torch, quantization["compute_dtype"])
    packed, scales = format_of(config).quantize(weight)
    if config.type == "int8":
        return int8_vectorwise_dequant(packed.view(torch.int8), scales.view(torch.float32)).to(dtype)
    state = _quant_state(scales, config, weight.numel(), dtype)
    return dequantize_4bit(packed.view(-1, 1), state).view_as(weight)


def _quant_state(scales: torch.Tensor, config: QuantizationConfig, num_weights: int, dtype: torch.dtype) -> Any:
    """bitsandbytes' own form of the scales of a 4-bit weight."""
    from bitsandbytes.functional import QuantState

    num_blocks = -(-num_weights // BLOCK_SIZE)
    offset, nested = None, None
    if config.double_quant:
        floats, scales = scales[:-num_blocks].view(torch.float32), scales[-num_blocks:]
        code = dynamic_map(scales.device)
        offset = floats[-1]
        nested = QuantState(floats[:-1], code=code, blocksize=SCALES_PER_GROUP, dtype=torch.float32)
    else:
        scales = scales.view(torch.float32)
    # As one row: on the CPU bitsandbytes 0.50 takes wrong scales where a row's length is no multiple of the block's.
    return QuantState(scales, torch.Size([1, num_weights]), None, BLOCK_SIZE, config.type, dtype, offset, nested)
