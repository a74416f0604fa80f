"""vLLM, and nothing else: this is the only file that imports it. Written for 0.25.1 to 0.32.0.

``python -m trainer.vllm_engine JOB REPLY`` does a `trainer.vllm_job.Job` that a file holds, and writes the replies.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams

from trainer.errors import PacktrainError, UserError
from trainer.model.weights import weight_files
from trainer.servable import Servable, gpu_counts, share_of_host_memory
from trainer.vllm_job import Answer, Job, Scores, Served, parse_job

SHARE_OF_FREE_MEMORY = 0.9
MOST_WEIGHTS = 0.6  # of a GPU's free memory; the rest is for the KV cache and what is computed


class _Stop(BaseException):
    """A signal that asked to end; nothing of vLLM's catches it."""


class VLLMEngine:
    """One loaded model; prompts and answers are token ids.

    Args:
        max_length: tokens of the longest prompt with its answer; default: what the model has and the memory holds.
        seed: of the first sampled answer; each further one has the next.

    Raises:
        PacktrainError: vLLM cannot load it.
        KeyboardInterrupt: Ctrl-C while it starts. SystemExit: SIGTERM then. Its processes have ended.
    """

    def __init__(self, servable: Servable, max_length: int | None = None, seed: int = 0) -> None:
        self._next_seed = seed
        self._lora = LoRARequest("trained", 1, servable.adapter) if servable.adapter else None
        settings: dict[str, Any] = {}
        if servable.adapter:
            settings = {"enable_lora": True, "max_loras": 1, "max_lora_rank": servable.max_rank}
        if servable.generation_config:
            settings["generation_config"] = servable.generation_config
        try:
            with _stopped_by_signals():
                self._llm = LLM(
                    model=servable.model,
                    tokenizer=servable.tokenizer,
                    dtype=servable.dtype,
                    max_model_len=min(max_length, servable.max_length) if max_length else -1,
                    enforce_eager=True,  # half a minute sooner; a command answers few prompts
                    **_memory_settings(servable),
                    **settings,
                )
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:500]
            raise PacktrainError(f"vLLM cannot load {servable.model}: {reason}") from error

    def complete(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continues each prompt until a stop token or `max_new_tokens`.

        Args:
            prompts: token ids.
            temperature: 0 decodes greedily; above, the n-th answer of this engine is drawn with seed + n.
            num_beams: width of vLLM's own beam search, which weighs a beam by the length of prompt and answer.
            stop_ids: tokens that end an answer beside those that the model's and tokenizer's files name.

        Returns:
            The answers' tokens, with the one they ended at.

        Raises:
            UserError: beams are asked for together with sampling, or where other tokens than the tokenizer's EOS end
                answers; or a prompt is longer than the model.
        """
        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        try:
            if num_beams > 1:
                self._check_beams(temperature, stop_ids)
                beams = BeamSearchParams(beam_width=num_beams, max_tokens=max_new_tokens)
                found = self._llm.beam_search(inputs, beams, lora_request=self._lora)
                return [f.sequences[0].tokens[len(p) :] for f, p in zip(found, prompts, strict=True)]
            sampling = [
                SamplingParams(
                    max_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop_token_ids=list(stop_ids),
                    seed=self._draw_seed() if temperature > 0 else None,
                    detokenize=False,
                )
                for _ in prompts
            ]
            outputs = self._llm.generate(inputs, sampling, use_tqdm=False, lora_request=self._lora)
        except (ValueError, VLLMValidationError) as error:  # the second is the first before 0.32
            raise UserError("prompt", f"vLLM refuses it: {error}") from error
        return [list(output.outputs[0].token_ids) for output in outputs]

    def chat(
        self, conversations: Sequence[dict[str, Any]], max_new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> list[Answer]:
        """Greedy answers to messages that vLLM renders and tokenises itself, as its server would."""
        sampling = SamplingParams(
            max_tokens=max_new_tokens, temperature=0.0, stop_token_ids=list(stop_ids), detokenize=False
        )
        answers: dict[int, Answer] = {}
        for tools in {json.dumps(c["tools"]): c["tools"] for c in conversations}.values():  # chat takes one list
            chosen = [i for i, conversation in enumerate(conversations) if conversation["tools"] == tools]
            outputs = self._llm.chat(
                [conversations[i]["messages"] for i in chosen],
                sampling_params=sampling,
                use_tqdm=False,
                lora_request=self._lora,
                tools=tools or None,
            )
            for i, output in zip(chosen, outputs, strict=True):
                answer = output.outputs[0]
                ids = list(answer.token_ids)
                answers[i] = Answer(list(output.prompt_token_ids), ids, answer.finish_reason == "stop")
        return [answers[i] for i in range(len(conversations))]

    def score(self, rows: Sequence[tuple[list[int], int]], with_adapter: bool = True) -> list[Scores]:
        """Log-probabilities of each row's tokens from its start position on, each given those before it."""
        inputs: list[Any] = [{"prompt_token_ids": ids} for ids, _ in rows]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        lora = self._lora if with_adapter else None
        # Built for CPUs, vLLM 0.32 fails at an adapter's prompt log-probabilities where requests share a batch.
        at_once = 1 if self._lora and not torch.cuda.is_available() else max(1, len(inputs))
        batches = [inputs[i : i + at_once] for i in range(0, len(inputs), at_once)]
        outputs = [o for b in batches for o in self._llm.generate(b, sampling, use_tqdm=False, lora_request=lora)]
        return [_scores(output.prompt_logprobs, *row) for output, row in zip(outputs, rows, strict=True)]

    def _check_beams(self, temperature: float, stop_ids: Sequence[int]) -> None:
        eos = self._llm.get_tokenizer().eos_token_id
        if temperature > 0:
            found = "vLLM's beam search does not sample"
        elif others := sorted(set(stop_ids) - {eos}):
            found = f"vLLM's beam search ends answers at token {eos} alone, and this model ends them at {others} too"
        else:
            return
        raise UserError("num_beams", found, "1", "--engine transformers")

    def _draw_seed(self) -> int:
        self._next_seed += 1
        return self._next_seed - 1


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ends what is inside at SIGINT and SIGTERM, with vLLM's own clearing up.

    While vLLM starts it swallows KeyboardInterrupt (``vllm/utils/network_utils.py``: zmq_socket_ctx) and waits ten
    minutes for an engine process that the same Ctrl-C has ended.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise _Stop(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stop as stopped:
        (number,) = stopped.args
        if number == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_job(job: Job) -> Served:
    """Loads the job's model and asks it everything."""
    engine = VLLMEngine(job.servable, job.max_length)
    return Served(
        engine=f"vLLM {vllm.__version__}",
        answers=engine.chat(job.conversations, job.max_new_tokens, job.stop_ids),
        scores=engine.score(job.rows),
        without_adapter=engine.score(job.rows, with_adapter=False) if job.servable.adapter else None,
    )


def _scores(prompt_logprobs: Sequence[Any], ids: list[int], start: int) -> Scores:
    places = range(start, len(ids))
    own = [prompt_logprobs[i][ids[i]].logprob for i in places]
    tops = [max(prompt_logprobs[i].items(), key=lambda item: item[1].logprob)[0] for i in places]
    return Scores(own, tops)


def _memory_settings(servable: Servable) -> dict[str, Any]:
    """As few of the visible GPUs as hold the weights, and most of the memory that is free on them."""
    if not torch.cuda.is_available():
        return {"gpu_memory_utilization": share_of_host_memory()}
    free, total = torch.cuda.mem_get_info()
    num_bytes = sum(file.stat().st_size for file in weight_files(Path(servable.model)))
    counts = gpu_counts(servable.shape, torch.cuda.device_count())
    fitting = [n for n in counts if num_bytes / n <= MOST_WEIGHTS * free]
    return {
        "tensor_parallel_size": fitting[0] if fitting else counts[-1],
        "gpu_memory_utilization": round(SHARE_OF_FREE_MEMORY * free / total, 3),
    }


def main(job_file: str, reply_file: str) -> None:
    """Does the job in `job_file`; the reply appears in `reply_file`."""
    job = parse_job(json.loads(Path(job_file).read_text(encoding="utf-8")))
    served = run_job(job)
    whole = Path(f"{reply_file}.tmp")
    whole.write_text(json.dumps(asdict(served)), encoding="utf-8")
    whole.replace(reply_file)


if __name__ == "__main__":  # vLLM's own processes import this file again
    main(*sys.argv[1:])
