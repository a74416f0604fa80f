"""Answers equal plain transformers', one prompt at a time; nothing of a training is disturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.export_toys import make_run
from tests.unit.test_merge import LORA, NF4
from trainer.config import RunConfig
from trainer.data.masking import load_template
from trainer.errors import UserError
from trainer.export.merge import merge_adapter
from trainer.generate import answer_samples, generate, load_for_inference, prompt_token_ids
from trainer.model.load import load_model
from trainer.model.tokenizer import load_tokenizer

PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 20, 30, 40, 41], [1, 100, 101, 102]]


@pytest.fixture(scope="module")
def plain(toy_model_dir: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(toy_model_dir).eval(), AutoTokenizer.from_pretrained(toy_model_dir)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_padded_batch_equals_single_prompts(plain: tuple[Any, Any], num_beams: int) -> None:
    model, tokenizer = plain
    expected = []
    for ids in PROMPTS:
        output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, num_beams=num_beams)
        expected.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 8):
        found = generate(model, tokenizer, PROMPTS, 12, num_beams=num_beams, batch_size=batch_size)
        assert found == expected


def test_stops_at_every_end_token(plain: tuple[Any, Any]) -> None:
    model, tokenizer = plain
    whole = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    stop = whole[4]
    assert stop not in whole[:4]
    answer = generate(model, tokenizer, PROMPTS[:1], 12, stop_ids=[stop])[0]
    assert answer == tokenizer.decode(whole[:5], skip_special_tokens=True)


def test_sampling_follows_seed_and_temperature(plain: tuple[Any, Any]) -> None:
    model, tokenizer = plain

    def sample(seed: int, **settings: float) -> list[str]:
        torch.manual_seed(seed)
        return generate(model, tokenizer, PROMPTS, 12, **settings)  # type: ignore[arg-type]

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0) != sample(2, temperature=1.0)
    greedy = generate(model, tokenizer, PROMPTS, 12)
    assert sample(1, temperature=1.0, top_p=1e-6) == greedy != sample(1, temperature=1.0)


def test_settings_of_the_models_own_file_do_not_leak_in(plain: tuple[Any, Any]) -> None:
    model, tokenizer = plain
    greedy = generate(model, tokenizer, PROMPTS, 12)
    before = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=2)
    try:
        assert generate(model, tokenizer, PROMPTS, 12) == greedy
    finally:
        model.generation_config.update(**before)


@pytest.mark.parametrize("quantization", [None, NF4])
def test_run_dir_answers_as_its_merged_model(
    quantization: dict[str, Any] | None, tmp_path: Path, toy_recipe: Callable[..., RunConfig]
) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA, quantization=quantization))
    merge_adapter(run, run / "merged")
    answers = {}
    for name in ("run", "run/merged", "run/adapter", "run/checkpoints/step_00000001/adapter"):
        loaded = load_for_inference(tmp_path / name)
        answers[name] = loaded.answer([loaded.prompt_ids("Write a b c d backwards.")], 12)
        assert loaded.config is not None
    assert len(set(map(tuple, answers.values()))) == 1


def test_adapter_that_no_run_surrounds(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA))
    (run / "adapter").rename(tmp_path / "alone")
    alone, within = load_for_inference(tmp_path / "alone"), load_for_inference(run)  # the run's is its checkpoint's
    ids = [alone.prompt_ids("Sort d c b a.")]
    assert alone.config is None
    assert alone.answer(ids, 12) == within.answer(ids, 12)


def test_prompts_are_rendered_as_trained_with_one_bos(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    loaded = load_for_inference(make_run(tmp_path / "run", toy_recipe(adapter=LORA)))
    ids = loaded.prompt_ids("hi")
    assert loaded.tokenizer.decode(ids) == "<|begin|><|user|>hi<|end|><|assistant|>"
    assert ids.count(loaded.tokenizer.bos_token_id) == 1
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = loaded.tokenizer.decode(loaded.prompt_ids(turns))
    assert text == "<|begin|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"


def test_without_a_template_a_prompt_is_text_to_go_on_with(plain: tuple[Any, Any], toy_tokenizer_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(toy_tokenizer_dir)
    tokenizer.chat_template = None
    ids = prompt_token_ids("rev(a b", load_template("tokenizer", tokenizer), tokenizer)
    assert ids == tokenizer("rev(a b").input_ids


def test_samples_in_the_middle_of_training_disturb_nothing(toy_recipe: Callable[..., RunConfig]) -> None:
    config = toy_recipe(adapter={**LORA, "dropout": 0.1}, quantization=NF4)
    model, tokenizer = load_model(config, torch.device("cpu")).model, load_tokenizer(config.model)
    template = load_template(config.data.template, tokenizer)
    model.train()
    ids = torch.tensor([[5, 6, 7, 8]])

    def state() -> tuple[Any, ...]:
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss.item(), model.config._attn_implementation, [m.training for m in model.modules()]

    before, rng = state(), torch.get_rng_state()
    answers = answer_samples(model, tokenizer, ["Write a b c d backwards.", "hi"], template, 8)
    assert len(answers) == 2
    assert torch.equal(torch.get_rng_state(), rng)
    assert state() == before


def test_folder_that_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        load_for_inference(tmp_path)
