"""vLLM and transformers give the same answers to the same tokens; vLLM's stand-in is the engine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from launch.demo import write_jsonl
from tests.unit.export_toys import make_run
from tests.unit.test_merge import LORA, NF4
from tests.unit.vllm_stand_in import stand_in
from trainer.answering import load_answerer
from trainer.checkpoint.result import find_result
from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.merge import merge_adapter
from trainer.generate import load_for_inference
from trainer.servable import find_servable, vllm_is_usable

__all__ = ["stand_in"]
PROMPTS = ["Sort d c b a.", "Write a b c d backwards.", "hi"]


@pytest.fixture(autouse=True)
def with_gpu(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host with a GPU and vLLM; the stand-in computes on the CPU all the same."""
    monkeypatch.setattr("trainer.answering.vllm_is_usable", lambda: True)


def run_in(folder: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path, **sections: object) -> Path:
    model = {"path": str(toy_model_dir), "dtype": "bfloat16"}
    return make_run(folder / "run", toy_recipe(model=model, adapter=LORA, **sections))


def test_unmerged_adapter_answers_as_under_transformers(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    run = run_in(tmp_path, toy_recipe, toy_model_dir)
    ours, theirs = load_answerer(run), load_for_inference(run)
    ids = [ours.prompt_ids(prompt) for prompt in PROMPTS]
    assert type(ours).__name__ == "VLLMModel"
    assert ids == [theirs.prompt_ids(prompt) for prompt in PROMPTS]
    assert ours.answer(ids, 4) == theirs.answer(ids, 4)  # few tokens: an untrained bfloat16 model's logits tie
    plain = load_for_inference(toy_model_dir)
    assert ours.answer(ids, 4) != plain.answer(ids, 4)


def test_qlora_is_served_merged_else_by_transformers(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(tmp_path, toy_recipe, toy_model_dir, quantization=NF4)
    with caplog.at_level(logging.INFO):
        assert type(load_answerer(run)).__name__ == "InferenceModel"
    assert "transformers answers" in caplog.text and "trained on a base in nf4" in caplog.text
    with pytest.raises(UserError, match="trained on a base in nf4"):
        load_answerer(run, "vllm")
    merge_adapter(run, run / "merged", "original")  # the base that the adapter has never seen
    assert type(load_answerer(run)).__name__ == "InferenceModel"
    (run / "merged").rename(tmp_path / "aside")
    merge_adapter(run, run / "merged")
    assert type(load_answerer(run)).__name__ == "VLLMModel"


def test_sampling_beams_and_ends(toy_model_dir: Path) -> None:
    def sample(seed: int, **settings: float) -> list[str]:
        model = load_answerer(toy_model_dir, "vllm", seed)
        return model.answer([model.prompt_ids(PROMPTS[0])] * 2, 8, **settings)

    first = sample(1, temperature=1.0)
    assert first == sample(1, temperature=1.0) != sample(2, temperature=1.0)
    assert first[0] != first[1]  # equal prompts of one call are drawn apart
    assert sample(1, temperature=1.0, top_p=1e-6) == sample(1)
    theirs = load_for_inference(toy_model_dir)
    assert sample(1, num_beams=3) == theirs.answer([theirs.prompt_ids(PROMPTS[0])] * 2, 8, num_beams=3)
    with pytest.raises(UserError, match="beam search does not sample"):
        sample(1, num_beams=3, temperature=1.0)


def test_beams_and_a_stop_token_that_vllms_search_does_not_know(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|user|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    run = run_in(tmp_path, toy_recipe, toy_model_dir, data={"template": template})
    assert type(load_answerer(run)).__name__ == "VLLMModel"
    assert type(load_answerer(run, beams=True)).__name__ == "InferenceModel"


def test_adapters_own_stop_token_ends_answers(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    """Answers as `packtrain serve` and the gate get them: without being told of stop tokens by the request."""
    from trainer.vllm_engine import VLLMEngine

    run = run_in(tmp_path, toy_recipe, toy_model_dir)
    prompt = [load_answerer(run).prompt_ids(PROMPTS[0])]
    (answer,) = VLLMEngine(find_servable(find_result(run))).complete(prompt, 8)
    assert len(answer) > 1
    (run / "adapter" / "generation_config.json").write_text(json.dumps({"eos_token_id": answer[0]}))
    assert VLLMEngine(find_servable(find_result(run))).complete(prompt, 8) == [answer[:1]]


def test_prompt_that_is_too_long(toy_model_dir: Path) -> None:
    model = load_answerer(toy_model_dir)
    with pytest.raises(UserError, match="vLLM refuses it"):
        model.answer([[1] * 100_000], 4)


def test_model_that_vllm_does_not_load(toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(vllm.LLM, "__init__", no_memory)
    with pytest.raises(PacktrainError, match="vLLM cannot load .* Engine core initialization failed"):
        load_answerer(toy_model_dir)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_vllm_starts_ends_the_command(
    number: int, status: int, toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    def swallow_interrupts(*_: object, **__: object) -> None:
        """As vLLM does, which then waits for an engine that the same Ctrl-C has ended."""
        with contextlib.suppress(KeyboardInterrupt, Exception):
            os.kill(os.getpid(), number)
        raise RuntimeError("waited in vain")

    monkeypatch.setattr(vllm.LLM, "__init__", swallow_interrupts)
    handler = signal.getsignal(number)
    try:
        ended = main(["generate", str(toy_model_dir), "--prompt", "hi"])
    except SystemExit as error:
        ended = error.code  # type: ignore[assignment]
    assert ended == status
    assert signal.getsignal(number) == handler


def test_commands(toy_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [{"prompt": PROMPTS[1], "num_beams": 2}, {"prompt": PROMPTS[2], "temperature": 0.7}]
    file = write_jsonl(tmp_path / "in.jsonl", requests)
    answers = {}
    for engine in ("vllm", "transformers"):
        out = tmp_path / f"{engine}.jsonl"
        command = ["generate", str(toy_model_dir), "--prompt", PROMPTS[0], "--prompts", str(file), "--out", str(out)]
        assert main([*command, "--max-new-tokens", "8", "--engine", engine]) == 0
        answers[engine] = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    assert answers["vllm"][:2] == answers["transformers"][:2]


def test_chat_prints_each_answer(
    toy_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for engine in ("vllm", "transformers"):
        lines = iter([PROMPTS[0], PROMPTS[1], "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt="", lines=lines: next(lines))
        assert main(["chat", str(toy_model_dir), "--max-new-tokens", "8", "--engine", engine]) == 0
        said[engine] = capsys.readouterr().out
    assert said["vllm"] == said["transformers"]


def test_vllm_is_asked_for_and_not_here(
    toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    if vllm_is_usable():
        pytest.skip("it is here")
    for command in (["generate", "--prompt", "hi", "--engine", "vllm"], ["verify", "--vllm"]):
        assert main([command[0], str(toy_model_dir), *command[1:]]) == 2
        assert "no GPU is visible" in capsys.readouterr().err
