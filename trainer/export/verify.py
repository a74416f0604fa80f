"""Proves that a merged model is the one trained, by a path that shares no arithmetic with the merge.

Here PEFT merges each layer and PEFT's forward gives the logits to compare with; bitsandbytes' own functions read the
quantised base. Everything is float32 and streamed layer by layer, so a 70B model needs the memory of one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from trainer.checkpoint.layout import MANIFEST, RunDir, find_damage, read_manifest
from trainer.config import ModelConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.as_trained import AsTrained, base_name
from trainer.export.base import EMBEDDING, HEAD, BaseTensors, settings_of_result
from trainer.export.serving import tokenizer_as_trained
from trainer.export.streaming import Outputs, build_empty, run_streamed, weights_of
from trainer.export.validation import ValidationLoss, compare_losses, record_proof, validation_rows
from trainer.export.verify_files import as_list, compare_ends, compare_tokenizer
from trainer.export.verify_prompts import collect_prompts
from trainer.prompting import load_prompting
from trainer.servable import why_only_merged

MAX_LOGIT_ERROR = 0.05  # of the adapter's own effect on the logits
MAX_ROUNDED_OTHERWISE = 0.01  # share of a 16-bit tensor's elements that may lie one step beside the rounding


@dataclass(frozen=True)
class VerifyReport:
    """Evidence that a merge is right.

    Attributes:
        merged_onto: `dequantized` or `original` base.
        not_trained_on: type that the base was quantised to in training, where it was merged onto in 16 or 32 bits: then
            this is the adapter on that base, and not the model that was trained.
        tensors: compared with PEFT's float32 merge. adapted: of them, those with an adapter.
        rounded_otherwise: largest share of a tensor's elements that lie one rounding step beside the reference.
        logit_error: ``|merged - (base + adapter)| / |(base + adapter) - base|`` over all positions, root mean square.
        adapter_effect: ``|(base + adapter) - base| / |base|``, likewise.
        prompts: number of prompts and where they come from.
        computed: dtype and device of the comparison.
        seconds: wall-clock time.
        validation: what merging did to the loss of some validation rows; None without such rows.
        is_recorded: whether the recipe that the adapter was trained with is known.
    """

    folder: Path
    merged_onto: str
    not_trained_on: str | None
    tensors: int
    adapted: int
    rounded_otherwise: float
    logit_error: float
    adapter_effect: float
    prompts: str
    computed: str
    seconds: float
    validation: ValidationLoss | None
    is_recorded: bool

    @property
    def what(self) -> str:
        """What the evidence shows the folder to be."""
        if self.not_trained_on:
            told = f"that was the base in {self.not_trained_on}"
            return f"the adapter on the original base, on which it was not trained: {told}"
        if not self.is_recorded:
            return "the adapter on the base that its config names, and how it was trained is not recorded"
        return "the model that was trained"


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
        wanted = "the adapter on the original base" if verifier.not_trained_on else "the model that was trained"
        raise PacktrainError(f"{folder} is not {wanted}:\n{as_list(problems)}")
    record_proof(folder, verifier.validation)
    return VerifyReport(
        folder=folder,
        merged_onto=verifier.manifest["merged_onto"],
        not_trained_on=verifier.not_trained_on,
        tensors=len(verifier.merged.shapes),
        adapted=verifier.num_adapted,
        rounded_otherwise=verifier.rounded_otherwise,
        logit_error=error,
        adapter_effect=effect,
        prompts=prompts,
        computed=f"float32 on {verifier.device.type}",
        seconds=round(time.monotonic() - started, 3),
        validation=verifier.validation,
        is_recorded=verifier.result.config is not None,
    )


class Verifier:
    """One comparison: the merged folder on one side, base and adapter through PEFT on the other."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.folder, self._look = folder, check
        self.merged = BaseTensors(ModelConfig.model_validate({"path": str(folder)}))
        self.trained = AsTrained(folder, check)
        self.base, self.result, self.manifest = self.trained.base, self.trained.result, self.trained.manifest
        self.config, self.dtype, self.device = self.trained.config, self.trained.dtype, self.trained.device
        self.peft_model, self.prompting = self.trained.peft_model, load_prompting(self.result)
        self.num_adapted, self.rounded_otherwise = 0, 0.0
        self.validation: ValidationLoss | None = None

    @property
    def not_trained_on(self) -> str | None:
        """See `VerifyReport`."""
        quantization = self.trained.quantization
        return quantization["type"] if quantization and not self.manifest["quantization"] else None

    def compare_files(self) -> list[str]:
        """Tokenizer, template, stop tokens, and the names of the tensors."""
        prompting, settings_of = self.prompting, settings_of_result(self.result, self.base)
        stop_tokens = prompting.stop_ids
        wanted = tokenizer_as_trained(prompting.tokenizer, prompting.template_name)
        problems = compare_tokenizer(self.folder, wanted)
        listed = set(self.manifest["files"])
        problems += [
            f"{file.name} is not of this merge, and a server may load it"
            for file in sorted(self.folder.glob("*.safetensors"))
            if file.name not in listed
        ]
        problems += compare_ends(self.folder, settings_of, self.base.config, stop_tokens)
        return problems + self._compare_names()

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
            elif not torch.equal(found, self.trained.read(f"base_model.model.{tensor}").to(self.dtype)):
                problems.append(f"{tensor} has no adapter, and differs from the {self.manifest['merged_onto']} base")
        return problems

    def compare_logits(self, problems: list[str]) -> tuple[float, float, str]:
        """Logits of merged and of base + adapter on real prompts; adds to `problems` with the layers that differ.

        Returns:
            The error relative to the adapter's effect, that effect relative to the base's logits, and the prompts used.
        """
        prompts, source = collect_prompts(self.result.config, self.prompting)
        described = f"{len(prompts)} {source}"
        rows = validation_rows(self.result.config, self.prompting)
        inputs, compared = prompts + [row.ids for row in rows], sum(map(len, prompts))
        try:
            tuned, tuned_rows = run_streamed(self.peft_model, self.trained.read, inputs, self.device).cut(compared)
            with self.peft_model.disable_adapter():
                base, base_rows = run_streamed(self.peft_model, self.trained.read, inputs, self.device).cut(compared)
            merged, merged_rows = run_streamed(build_empty(self.config), self._read_merged, inputs, self.device).cut(
                compared
            )
            if rows and self.trained.quantization != self.manifest["quantization"]:
                read = partial(self.trained.read, on_own_base=True)
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

    def _compare_names(self) -> list[str]:
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        expected = {name for name, _ in build_empty(self.config).named_parameters()} - tied
        problems = [f"{name} is missing" for name in sorted(expected - set(self.merged.shapes))]
        problems += [f"{name} has no place in the model" for name in sorted(set(self.merged.shapes) - expected - tied)]
        own = set(get_peft_model_state_dict(self.peft_model, save_embedding_layers=False))
        stored = set(self.trained.adapter_tensors)
        grown = {f"base_model.model.{name}" for name in (EMBEDDING, HEAD)}  # saved whole when tokens were added
        problems += [f"PEFT finds no {name} in the adapter" for name in sorted(own - stored)]
        problems += [f"PEFT has no place for the adapter's {name}" for name in sorted(stored - own - grown)]
        return problems

    def _compare_adapted(self, tensor: str, found: torch.Tensor, name: str, module: Any) -> list[str]:
        # A copy, because PEFT merges in place and a read may be a view of the base's mapped file.
        with weights_of(module, f"{name}.", lambda parameter: self.trained.read(parameter).clone()):
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


def find_merged(folder: Path) -> Path | None:
    """`folder` where packtrain merged it, or the merged one inside a run dir; None where there is none."""
    places = (folder, RunDir(folder).merged)
    return next((p for p in places if (p / MANIFEST).exists() and read_manifest(p).get("kind") == "merged"), None)


def _merged_folder(folder: Path) -> Path:
    if merged := find_merged(folder):
        return merged
    raise UserError(
        str(folder),
        "holds no model that packtrain merged, nor one that it has fully fine-tuned",
        "a merged folder, a full fine-tune's model, or a run dir that has one of them",
        "`packtrain merge` an adapter, and let `packtrain train` finish a full fine-tune",
    )


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
