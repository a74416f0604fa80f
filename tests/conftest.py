"""Toys that all tests share, made by the demo's functions. Heavy imports happen inside the fixtures that need them."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads make small CPU steps many times slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PACKTRAIN_CACHE"] = tempfile.mkdtemp(prefix="packtrain-cache-")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
gc.disable()  # while tests are collected: imports make objects that stay, and no garbage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainer.config import RunConfig


def pytest_collection_finish() -> None:
    """What was imported is never searched for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, begin and end tokens, chat template with system and generation prompt; `<|end|>` stops."""
    from launch.demo import chat_rows, text_rows, train_tokenizer

    texts = [row["text"] for row in text_rows(200, seed=1)]
    texts += [message["content"] for row in chat_rows(200, seed=1) for message in row["messages"]]
    return train_tokenizer(texts)


@pytest.fixture(scope="session")
def toy_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of the toy tokenizer alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_model_dir(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Random Llama with its tokenizer: hidden 64, 2 layers, 4 heads on 2 KV heads, float32 safetensors."""
    return _save_toy_model(tmp_path_factory.mktemp("model"), toy_tokenizer, tied=False)


@pytest.fixture(scope="session")
def toy_tied_model_dir(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> Path:
    """`toy_model_dir`'s shape with the head tied to the embeddings; its safetensors hold no `lm_head.weight`."""
    return _save_toy_model(tmp_path_factory.mktemp("tied"), toy_tokenizer, tied=True)


@pytest.fixture(scope="session")
def toy_rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows `{"messages": [user, assistant]}` of some 20 tokens; every fourth has a system message first."""
    from launch.demo import chat_rows, write_jsonl

    rows = list(chat_rows(64, seed=2))
    for row in rows[::4]:
        row["messages"].insert(0, {"role": "system", "content": "Answer with letters."})
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture
def toy_recipe(toy_model_dir: Path, toy_rows_file: Path) -> Callable[..., RunConfig]:
    """Makes a RunConfig of 4 short steps on the toys; sections given are merged over the defaults, None removes one.

    ``toy_recipe(adapter={"r": 4}, quantization={}, train={"max_steps": 2})``
    """
    from trainer.config import RunConfig

    defaults: dict[str, Any] = {
        "model": {"path": str(toy_model_dir), "dtype": "float32"},
        "data": {
            "train": [{"path": str(toy_rows_file), "format": "messages"}],
            "split": {"validation": 0.25},
            "pack_length": 128,
        },
        "optim": {"lr": 1.0e-2},
        "train": {"epochs": 1, "max_steps": 4, "global_batch": {"rows": 2}, "micro_batch": 1, "recompute": "none"},
        "tracking": {"to": []},
        "export": {"merge": False},
    }

    def build(**sections: Any) -> RunConfig:
        merged = {**defaults}
        for name, section in sections.items():
            both_dicts = isinstance(section, dict) and isinstance(defaults.get(name), dict)
            merged[name] = {**defaults[name], **section} if both_dicts else section
        return RunConfig.model_validate({name: section for name, section in merged.items() if section is not None})

    return build


@pytest.fixture
def toy_recipe_file(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> Callable[..., Path]:
    """Writes what `toy_recipe` makes as `recipe.yaml` in the test's folder."""
    import yaml

    def write(**sections: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        config = toy_recipe(**sections).model_dump(mode="json", exclude_unset=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_session_alone() -> Any:
    """Removes the temporary data cache at the end."""
    import shutil

    yield
    shutil.rmtree(os.environ["PACKTRAIN_CACHE"], ignore_errors=True)


def _save_toy_model(folder: Path, tokenizer: PreTrainedTokenizerFast, tied: bool) -> Path:
    import torch
    from transformers import LlamaForCausalLM

    from launch.demo import llama_config

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(tokenizer, hidden=64, layers=2, heads=4, kv_heads=2, tied=tied))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def log_to_this_test() -> Iterator[None]:
    """The command line sets the log up once a process, and would hold on to an earlier test's stderr."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with `status` and a message that holds all `texts`; returns the message.

    ``refuses(["merge", run, "--out", run / "logs"], "--out: ", "fix: ", status=2)``
    """
    from launch import cli

    def check(arguments: list[Any], *texts: str, status: int = 2) -> str:
        assert cli.main([str(argument) for argument in arguments]) == status
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert not [text for text in texts if text not in message], message
        return message

    return check
