"""What packtrain uses of vLLM 0.25 to 0.32, by its names and arguments, computed by plain transformers on the CPU.

An adapter is applied as vLLM does it: by the names of the modules, those of no module being passed over in silence.
``VLLM_STAND_IN_FAULT`` makes it an engine that does something wrong, see `FAULTS`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, SamplingParams

__all__ = ["LLM", "LoRARequest", "SamplingParams"]
__version__ = "stand-in"
FAULTS = ("", "adapter ignored", "scaling forgotten", "second BOS", "no stop")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    finish_reason: str | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]


@dataclass
class BeamSearchSequence:
    tokens: list[int]


@dataclass
class BeamSearchOutput:
    sequences: list[BeamSearchSequence] = field(default_factory=list)


class LLM:
    """Two models at most: the one loaded, and a copy of it with the adapter."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        max_model_len: int = -1,
        enforce_eager: bool = False,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        generation_config: str = "auto",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.92,
    ) -> None:
        self.fault = os.environ.get("VLLM_STAND_IN_FAULT", "")
        assert self.fault in FAULTS
        self._folder, self._dtype = model, getattr(torch, dtype)
        self._rank = max_lora_rank if enable_lora else 0
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self._plain = self._load()
        self._length = self._plain.config.max_position_embeddings if max_model_len < 0 else max_model_len
        self._adapted: Any = None
        place = model if generation_config == "auto" else generation_config
        file = Path(place) / "generation_config.json"
        ends = GenerationConfig.from_pretrained(place).eos_token_id if file.exists() else None
        ends = ends if isinstance(ends, list) else [ends]
        own = [] if self.fault == "no stop" else [*ends, self._tokenizer.eos_token_id]
        self._ends = {end for end in own if end is not None}

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: SamplingParams | list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if longest := [len(prompt) for prompt in ids if len(prompt) >= self._length]:
            raise VLLMValidationError(f"a prompt has {longest[0]} tokens, the model {self._length}")
        model = self._model(lora_request)
        if all(p.temperature == 0 for p in params):
            answers = self._go_on(model, ids, params[0])
        else:
            answers = [self._go_on(model, [prompt], p)[0] for prompt, p in zip(ids, params, strict=True)]
        logprobs = _prompt_logprobs(model, ids) if params[0].prompt_logprobs else [None] * len(ids)
        return [RequestOutput(*output) for output in zip(ids, logprobs, [[a] for a in answers], strict=True)]

    def chat(
        self,
        messages: list[list[dict[str, Any]]],
        sampling_params: SamplingParams,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        bos = [self._tokenizer.bos_token_id] if self.fault == "second BOS" else []
        texts = [
            self._tokenizer.apply_chat_template(m, tools=tools, tokenize=False, add_generation_prompt=True)
            for m in messages
        ]
        prompts = [{"prompt_token_ids": bos + self._tokenizer(t, add_special_tokens=False).input_ids} for t in texts]
        return self.generate(prompts, sampling_params, lora_request=lora_request)

    def beam_search(
        self,
        prompts: list[dict[str, list[int]]],
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
    ) -> list[BeamSearchOutput]:
        settings = self._settings({self._tokenizer.eos_token_id}, params.max_tokens, num_beams=params.beam_width)
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            output = self._model(lora_request).generate(ids, generation_config=settings)
            found.append(BeamSearchOutput([BeamSearchSequence(output[0].tolist())]))
        return found

    def _go_on(self, model: Any, prompts: list[list[int]], params: SamplingParams) -> list[CompletionOutput]:
        ends = self._ends | set(params.stop_token_ids or ())
        sampling = {}
        if params.temperature > 0:
            sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
            torch.manual_seed(params.seed or 0)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = self._settings(ends, min(params.max_tokens, self._length - width), **sampling)
        output = model.generate(ids, attention_mask=mask, generation_config=settings)
        answers = []
        for row in output[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), None)
            answers.append(
                CompletionOutput(row if end is None else row[: end + 1], "length" if end is None else "stop")
            )
        return answers

    def _settings(self, ends: set[int], max_tokens: int, **settings: Any) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_tokens, eos_token_id=sorted(ends) or None, pad_token_id=0, **settings
        )

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=self._dtype).eval()

    def _model(self, request: LoRARequest | None) -> Any:
        if request is None:
            return self._plain
        if self._adapted is None:
            self._adapted = self._load()
            if self.fault != "adapter ignored":
                self._apply(Path(request.lora_path))
        return self._adapted

    def _apply(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] <= self._rank and not config["modules_to_save"] and not config["use_dora"]
        scaling = 1.0 if self.fault == "scaling forgotten" else config["lora_alpha"] / config["r"]
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, module in self._adapted.named_modules():
            a = tensors.get(f"base_model.model.{name}.lora_A.weight")
            if a is not None:
                b = tensors[f"base_model.model.{name}.lora_B.weight"]
                module.register_forward_hook(_beside(a.to(self._dtype), b.to(self._dtype), scaling))


def _beside(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Any:
    return lambda module, inputs, output: output + scaling * (inputs[0] @ a.T @ b.T)


@torch.no_grad()
def _prompt_logprobs(model: Any, prompts: list[list[int]]) -> list[list[dict[int, Logprob] | None]]:
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    logprobs = model(ids).logits.float().log_softmax(-1)
    return [[None, *(_top(row[i], t) for i, t in enumerate(p[1:]))] for row, p in zip(logprobs, prompts, strict=True)]


def _top(logprobs: torch.Tensor, token: int) -> dict[int, Logprob]:
    best = int(logprobs.argmax())
    rank = int((logprobs >= logprobs[token]).sum())
    return {token: Logprob(logprobs[token].item(), rank), best: Logprob(logprobs[best].item(), 1)}
