"""Proves that a merged model is the one trained, by a path that shares no arithmetic with the merge.

Here PEFT merges each layer and PEFT's forward gives the logits to compare with; bitsandbytes' own functions read the
quantised base. Everything is float32 and streamed layer by layer, so a 70B model needs the memory of one layer.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from trainer.checkpoint.layout import MANIFEST, RunDir, find_damage, hash_file, read_manifest
from trainer.checkpoint.result import Result, enclosing_run, find_result
from trainer.config import ModelConfig, QuantizationConfig, RunConfig
from trainer.data.masking import load_template, render_prompt, stop_token_ids
from trainer.data.prepare import iter_split_examples
from trainer.data.templates import Template
from trainer.data.types import Example
from trainer.errors import PacktrainError, UserError
from trainer.export.base import EMBEDDING, HEAD, BaseTensors, tokenizer_of_result
from trainer.export.serving import tokenizer_as_trained
from trainer.export.streaming import Outputs, build_empty, run_streamed, weights_of
from trainer.export.validation import ValidationLoss, compare_losses, record_loss, validation_rows
from trainer.export.verify_files import compare_ends, compare_tokenizer, read_exported_config
from trainer.generate import default_device
from trainer.model.adapter_files import ADAPTER_WEIGHTS
from trainer.model.nf4 import BLOCK_SIZE, SCALES_PER_GROUP, dynamic_map
from trainer.model.quantized import format_of
from trainer.servable import why_only_merged

logger = logging.getLogger(__name__)

MAX_LOGIT_ERROR = 0.05  # of the adapter's own effect on the logits
MAX_ROUNDED_OTHERWISE = 0.01  # share of a 16-bit tensor's elements that may lie one step beside the rounding
MAX_LISTED = 8
PROMPTS = ("The capital of France is", "Explain in one sentence why the sky is blue.", "1, 2, 3, 4,", "def add(a, b):")
MAX_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class VerifyReport:
    """Evidence that a merge is right.

    Attributes:
        merged_onto: `dequantized` or `original` base.
        tensors: compared with PEFT's float32 merge. adapted: of them, those with an adapter.
        rounded_otherwise: largest share of a tensor's elements that lie one rounding step beside the reference.
        logit_error: ``|merged - (base + adapter)| / |(base + adapter) - base|`` over all positions, root mean square.
        adapter_effect: ``|(base + adapter) - base| / |base|``, likewise.
        prompts: number of prompts and where they come from.
        computed: dtype and device of the comparison.
        seconds: wall-clock time.
        validation: what merging did to the loss of some validation rows; None without such rows.
    """

    folder: Path
    merged_onto: str
    tensors: int
    adapted: int
    rounded_otherwise: float
    logit_error: float
    adapter_effect: float
    prompts: str
    computed: str
    seconds: float
    validation: ValidationLoss | None


def verify_export(folder: Path, check: Callable[[], None] = lambda: None) -> VerifyReport:
    """Verifies a merged folder, or the one inside a run dir; its manifest says where base and adapter lie.

    The validation loss before and after merging is written into the folder's manifest and card.

    Args:
        check: called before each file and tensor; what it raises ends the verification.

    Raises:
        UserError: there is no merged model, or base or adapter are gone.
        PacktrainError: the merged model is not the one trained; the text is the evidence.
    """
    started = time.monotonic()
    folder = _merged_folder(folder)
    if damage := find_damage(folder, check):
        raise PacktrainError(f"{damage}\n  fix: delete {folder} and merge again")
    with torch.no_grad():
        verifier = Verifier(folder, check)
        problems = verifier.compare_files() or verifier.compare_tensors()
        error, effect, prompts = verifier.compare_logits(problems)
    if problems:
        listed = problems[:MAX_LISTED] + [f"... and {len(problems) - MAX_LISTED} more"] * (len(problems) > MAX_LISTED)
        raise PacktrainError(f"{folder} is not the model that was trained:\n" + "\n".join(f"  - {p}" for p in listed))
    if verifier.validation:
        record_loss(folder, verifier.validation)
    return VerifyReport(
        folder=folder,
        merged_onto=verifier.manifest["merged_onto"],
        tensors=len(verifier.merged.shapes),
        adapted=verifier.num_adapted,
        rounded_otherwise=verifier.rounded_otherwise,
        logit_error=error,
        adapter_effect=effect,
        prompts=prompts,
        computed=f"float32 on {verifier.device.type}",
        seconds=round(time.monotonic() - started, 3),
        validation=verifier.validation,
    )


class Verifier:
    """One comparison: the merged folder on one side, base and adapter through PEFT on the other."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.folder, self.manifest, self._look = folder, read_manifest(folder), check
        self.device = default_device()
        self.merged = BaseTensors(ModelConfig.model_validate({"path": str(folder)}))
        self.base = BaseTensors(ModelConfig.model_validate(self.manifest["model"]), self.manifest["seed"])
        self.result = self._find_adapter()
        self._check_base()
        self.adapter_tensors = load_file(self.result.folder / ADAPTER_WEIGHTS)
        self.dtype = getattr(torch, self.manifest["dtype"])
        self.config = read_exported_config(folder)
        self.peft_model = self._build_peft()
        self.num_adapted, self.rounded_otherwise = 0, 0.0
        self.validation: ValidationLoss | None = None

    def compare_files(self) -> list[str]:
        """Tokenizer, template, stop tokens, and the names of the tensors."""
        tokenizer, template_name = tokenizer_of_result(self.result, self.base)
        stop_tokens = stop_token_ids(load_template(template_name, tokenizer), tokenizer)
        wanted = tokenizer_as_trained(tokenizer, template_name)
        problems = compare_tokenizer(self.folder, wanted, PROMPTS)
        listed = set(self.manifest["files"])
        problems += [
            f"{file.name} is not of this merge, and a server may load it"
            for file in sorted(self.folder.glob("*.safetensors"))
            if file.name not in listed
        ]
        return problems + compare_ends(self.folder, self.base, stop_tokens) + self._compare_names()

    def compare_tensors(self) -> list[str]:
        """Every tensor against PEFT's merge in float32, rounded; those without adapter bitwise against the base."""
        problems: list[str] = []
        adapted = {}
        for name, module in self.peft_model.named_modules():
            if isinstance(module, LoraLayer):
                adapted[f"{base_name(name)}.weight"] = (name, module)
        self.num_adapted = len(adapted)
        for tensor in self.merged.shapes:
            found = self._read_trained_heads(tensor)
            if found is None:
                problems.append(f"{tensor}: the copies of a head differ")
            elif found.dtype != self.dtype:
                problems.append(f"{tensor} is {found.dtype}, and the manifest says {self.dtype}")
            elif tensor in adapted:
                problems += self._compare_adapted(tensor, found, *adapted[tensor])
            elif not torch.equal(found, self.read_trained(f"base_model.model.{tensor}").to(self.dtype)):
                problems.append(f"{tensor} has no adapter, and differs from the {self.manifest['merged_onto']} base")
        return problems

    def compare_logits(self, problems: list[str]) -> tuple[float, float, str]:
        """Logits of merged and of base + adapter on real prompts; adds to `problems` with the layers that differ.

        Returns:
            The error relative to the adapter's effect, that effect relative to the base's logits, and the prompts used.
        """
        prompts, source = self._prompts()
        described = f"{len(prompts)} {source}"
        rows = validation_rows(self.result.config, tokenizer_of_result(self.result, self.base)[0])
        inputs, compared = prompts + [row.ids for row in rows], sum(map(len, prompts))
        try:
            tuned, tuned_rows = run_streamed(self.peft_model, self.read_trained, inputs, self.device).cut(compared)
            with self.peft_model.disable_adapter():
                base, base_rows = run_streamed(self.peft_model, self.read_trained, inputs, self.device).cut(compared)
            merged, merged_rows = run_streamed(build_empty(self.config), self._read_merged, inputs, self.device).cut(
                compared
            )
            if rows and self.quantization != self.manifest["quantization"]:
                read = partial(self.read_trained, on_own_base=True)
                tuned_rows = run_streamed(self.peft_model, read, inputs[len(prompts) :], self.device).logits
            self.validation = compare_losses(rows, base_rows, tuned_rows, merged_rows)
        except (KeyError, RuntimeError) as failure:
            if not problems:
                raise
            problems.append(f"logits could not be compared: {failure}")
            return float("nan"), float("nan"), described
        effect = (tuned.logits - base.logits).norm()
        error = (merged.logits - tuned.logits).norm()
        # `not <=` so that NaN counts as an error; without any effect nothing may differ at all
        if not error <= MAX_LOGIT_ERROR * effect:
            ratio = (error / effect).item() if effect > 0 else float("inf")
            problems.insert(  # the first, so that no list of tensors hides it
                0,
                f"logits differ from base + adapter by {ratio:.3g} of the adapter's own effect, at most "
                f"{MAX_LOGIT_ERROR} is allowed; over {described}. {_by_layer(merged, tuned, base)}",
            )
            if len(problems) == 1 and self.dtype != torch.float32:
                refusal = why_only_merged(self.result)
                problems.append(
                    f"every tensor is the rounding of base + adapter, so {self.manifest['dtype']} is too coarse for "
                    f"what was trained: train with model.dtype: float32, or serve the adapter unmerged"
                    f"{f', which vLLM does not ({refusal})' if refusal else ''}"
                )
        return (error / effect).item() if effect > 0 else 0.0, (effect / base.logits.norm()).item(), described

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Of the base trained on, as the manifest tells that of the one merged onto."""
        config = self.result.config
        if config is None or config.quantization is None:
            return None
        return {**config.quantization.model_dump(mode="json"), "compute_dtype": config.compute_dtype}

    def _find_adapter(self) -> Result:
        """The adapter the manifest names, or where it moved to with its run."""
        record, run = self.manifest["adapter"], enclosing_run(self.folder)
        place = Path(record["path"])
        if run and record["in_run"] and (run.path / record["in_run"]).is_dir():
            place = run.path / record["in_run"]
        if not (place / ADAPTER_WEIGHTS).exists():
            raise UserError(str(self.folder), f"its adapter is not at {place} any more", fix="put it back")
        for name, expected in record["files"].items():
            if hash_file(place / name) != expected:
                raise PacktrainError(f"{place / name} is not the file that was merged\n  fix: merge again")
        recipe = self.manifest["recipe"]
        config = RunConfig.model_validate(recipe) if recipe else None
        return Result("adapter", place, config, find_result(place).run_dir, self.manifest["base"])

    def _check_base(self) -> None:
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

    def _compare_names(self) -> list[str]:
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        expected = {name for name, _ in build_empty(self.config).named_parameters()} - tied
        problems = [f"{name} is missing" for name in sorted(expected - set(self.merged.shapes))]
        problems += [f"{name} has no place in the model" for name in sorted(set(self.merged.shapes) - expected - tied)]
        own = set(get_peft_model_state_dict(self.peft_model, save_embedding_layers=False))
        stored = set(self.adapter_tensors)
        grown = {f"base_model.model.{name}" for name in (EMBEDDING, HEAD)}  # saved whole when tokens were added
        problems += [f"PEFT finds no {name} in the adapter" for name in sorted(own - stored)]
        problems += [f"PEFT has no place for the adapter's {name}" for name in sorted(stored - own - grown)]
        return problems

    def _compare_adapted(self, tensor: str, found: torch.Tensor, name: str, module: Any) -> list[str]:
        # A copy, because PEFT merges in place and a read may be a view of the base's mapped file.
        with weights_of(module, f"{name}.", lambda parameter: self.read_trained(parameter).clone()):
            weight = module.get_base_layer().weight
            before = weight.detach().clone()
            is_zero = not bool(module.lora_B["default"].weight.any()) and not module.use_dora["default"]
            module.merge()
            expected = module.get_base_layer().weight.detach().clone()
            module.merged_adapters.clear()
        if not is_zero and torch.equal(found, before.to(self.dtype)):
            return [f"{tensor} is the base's, although its adapter is not zero"]
        return self._compare_rounding(tensor, found, expected)

    def _compare_rounding(self, tensor: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
        """`found` must be `expected` rounded, up to one step where float32 sums in another order tip the rounding."""
        rounded = expected.to(self.dtype).float()
        difference = (found.float() - rounded).abs()
        step = torch.ldexp(torch.full_like(rounded, torch.finfo(self.dtype).eps), torch.frexp(rounded).exponent - 1)
        noise = 2.0**-18 * expected.abs().amax(dim=1, keepdim=True)  # of float32 sums
        beyond = (difference > step + noise).sum().item()
        share = (difference > noise).float().mean().item()
        self.rounded_otherwise = max(self.rounded_otherwise, share)
        if beyond or not bool(torch.isfinite(difference).all()):
            return [
                f"{tensor}: {beyond:,} of {found.numel():,} elements differ from PEFT's float32 merge by more than its "
                f"rounding to {self.manifest['dtype']}, by up to {difference.max().item():.3g}"
            ]
        if share > MAX_ROUNDED_OTHERWISE:
            return [f"{tensor}: {share:.1%} of the elements lie one step beside the rounding of PEFT's float32 merge"]
        return []

    def read_trained(self, name: str, on_own_base: bool = False) -> torch.Tensor:
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

    def _read_trained_heads(self, tensor: str) -> torch.Tensor | None:
        """A merged tensor with each repeated key or value head once; None where the copies of one differ."""
        found = self.merged.read(tensor, self.device)
        module, _, _ = tensor.rpartition(".")
        if not module.endswith(("k_proj", "v_proj")) or found.shape == self.base.shapes[tensor]:
            return found
        head_dim = self.base.config.head_dim
        copies = found.unflatten(0, (self.base.shapes[tensor][0] // head_dim, -1, head_dim))
        if not torch.equal(copies, copies[:, :1].expand_as(copies)):
            return None
        return copies[:, 0].flatten(0, 1)

    def _read_merged(self, name: str) -> torch.Tensor:
        self._look()
        source = EMBEDDING if name == HEAD and HEAD not in self.merged.shapes else name
        return self.merged.read(source, self.device).to(torch.float32)

    def _prompts(self) -> tuple[list[list[int]], str]:
        """Prompts of the run's own rows, or fixed ones where there is no run or its data is gone."""
        config = self.result.config
        tokenizer, _ = tokenizer_of_result(self.result, self.base)
        if config is not None:
            try:
                template = load_template(config.data.template, tokenizer)
                split = "validation" if config.data.split.validation else "train"
                rendered = _render_prompts(iter_split_examples(config, split, tokenizer), template, tokenizer)  # type: ignore[arg-type]
                prompts = [ids[-MAX_PROMPT_TOKENS:] for ids in islice(rendered, len(PROMPTS))]
                if prompts:
                    return prompts, f"prompts of the {split} rows"
            except (UserError, OSError) as error:
                logger.info("verifying on fixed prompts, as the run's data cannot be read: %s", error)
        return [tokenizer(text).input_ids[:MAX_PROMPT_TOKENS] for text in PROMPTS], "fixed prompts"


def _render_prompts(examples: Iterator[Example], template: Template, tokenizer: Any) -> Iterator[list[int]]:
    """Their prompts, but for rows that the template refuses, which were not trained on either."""
    for example in examples:
        try:
            ids = render_prompt(example, template, tokenizer)
        except TemplateError:
            continue
        if ids:
            yield ids


def find_merged(folder: Path) -> Path | None:
    """`folder` where packtrain merged it, or the merged one inside a run dir; None where there is none."""
    places = (folder, RunDir(folder).merged)
    return next((p for p in places if (p / MANIFEST).exists() and read_manifest(p).get("kind") == "merged"), None)


def _merged_folder(folder: Path) -> Path:
    if merged := find_merged(folder):
        return merged
    raise UserError(
        str(folder), "holds no model that packtrain merged", "a merged folder, or a run dir with merged/", "merge first"
    )


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


def _by_layer(merged: Outputs, tuned: Outputs, base: Outputs) -> str:
    """Where the difference begins: error after each layer, relative to the adapter's effect there."""
    shares = [
        (m - t).norm().item() / max((t - b).norm().item(), 1e-30)
        for m, t, b in zip(merged.hidden[1:], tuned.hidden[1:], base.hidden[1:], strict=True)
    ]
    return "Error after each layer: " + ", ".join(f"{i}: {share:.2g}" for i, share in _some(shares))


def _some(shares: list[float]) -> Iterator[tuple[int, float]]:
    """At most some 16 of them, evenly."""
    stride = max(1, len(shares) // 16)
    return ((i, share) for i, share in enumerate(shares) if i % stride == 0 or i == len(shares) - 1)
