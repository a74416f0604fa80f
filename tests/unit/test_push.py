"""`packtrain push`: huggingface_hub's own client against a Hub on this machine; what arrives is what lay there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from tests.unit.export_toys import make_run
from tests.unit.fake_hub import Hub, running_hub
from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig
from trainer.export.merge import merge_adapter
from trainer.export.result import write_result
from trainer.model.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "a" * 34


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path, toy_rows_file: Path) -> RunDir:
    """A finished LoRA run, with everything about it that must not leave this machine."""
    config = RunConfig.model_validate(
        {
            "model": {"path": str(toy_model_dir), "dtype": "float32"},
            "adapter": {"r": 4},
            "data": {"train": [{"path": str(toy_rows_file), "format": "messages"}]},
            "slurm": {"env": {"WANDB_API_KEY": "0123456789abcdef"}},
        }
    )
    run = RunDir(make_run(tmp_path_factory.mktemp("runs") / "hum", config))
    write_result(run, 1, config, load_tokenizer(config.model))
    merge_adapter(run.path, run.merged)
    run.write_state("done", 1)
    run.logs.mkdir()
    (run.logs / "rank_0.log").write_text("a log")
    (run.adapter / "optimizer.pt").write_text("moments")
    (run.merged / "recipe.yaml").write_text("slurm: {env: {WANDB_API_KEY: 0123456789abcdef}}")
    (run.merged / "rows.jsonl").write_text("{}")
    return run


@pytest.fixture
def run(tmp_path: Path, finished: RunDir) -> RunDir:
    return RunDir(shutil.copytree(finished.path, tmp_path / "hum"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def push(hub: Hub, tmp_path: Path, *tokens: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HOME": str(tmp_path)}
    environ |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}  # large files by LFS, whose protocol is public
    command = [sys.executable, "-P", "-m", "launch.cli", "push", *tokens]
    return subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path, timeout=120)


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_merged_model_arrives_whole_and_nothing_else_does(hub: Hub, run: RunDir, tmp_path: Path) -> None:
    hub.files = {"model-00001-of-00002.safetensors": b"of an earlier push", "notes.md": b"mine"}
    hub.private = True
    result = push(hub, tmp_path, str(run.path), "--repo", "llamas/hum")
    assert result.returncode == 0, result.stderr
    assert hub.commits == 1 and f"Bearer {TOKEN}" in hub.tokens
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert set(hub.files) == names | {"notes.md"}
    assert all(hub.files[name] == (run.merged / name).read_bytes() for name in names)
    assert f"{hub.url}/llamas/hum" in result.stdout and TOKEN not in result.stdout + result.stderr


def test_an_adapter_names_a_base_that_others_have(hub: Hub, run: RunDir, tmp_path: Path, toy_model_dir: Path) -> None:
    refused = push(hub, tmp_path, str(run.adapter), "--repo", "llamas/hum")
    assert refused.returncode == 2 and "--base" in refused.stderr and hub.private is None
    result = push(hub, tmp_path, str(run.adapter), "--repo", "llamas/hum", "--base", "meta-llama/Llama-2-7b-hf")
    assert result.returncode == 0, result.stderr
    assert hub.private is True and hub.commits == 1
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    metadata = front_matter(hub.files["README.md"].decode())
    assert metadata["base_model"] == "meta-llama/Llama-2-7b-hf" and metadata["base_model_relation"] == "adapter"
    everything = b"".join(hub.files.values())
    assert str(toy_model_dir).encode() not in everything and str(run.path).encode() not in everything
    assert b"0123456789abcdef" not in everything and "optimizer.pt" not in hub.files


def test_bytes_that_change_on_the_way_are_noticed(hub: Hub, run: RunDir, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        hub.damage = name
        result = push(hub, tmp_path, str(run.path), "--repo", "llamas/hum")
        assert result.returncode == 1 and f"first {name}" in result.stderr, result.stderr


def test_what_the_hub_refuses_is_told(hub: Hub, run: RunDir, tmp_path: Path) -> None:
    hub.refuse = True
    result = push(hub, tmp_path, str(run.path), "--repo", "llamas/hum")
    assert result.returncode == 2 and "no right to write" in result.stderr and "HF_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr and TOKEN not in result.stderr


def test_without_a_token_nothing_is_sent(hub: Hub, run: RunDir, tmp_path: Path) -> None:
    result = push(hub, tmp_path, str(run.path), "--repo", "llamas/hum", token="")
    assert result.returncode == 2 and "HF_TOKEN: no token" in result.stderr and "hf auth login" in result.stderr
    assert hub.private is None


def test_a_public_repository_has_to_be_meant(hub: Hub, run: RunDir, tmp_path: Path) -> None:
    hub.private = False
    result = push(hub, tmp_path, str(run.path), "--repo", "llamas/hum")
    assert result.returncode == 2 and "--public" in result.stderr and hub.commits == 0


def test_a_hub_that_is_not_there(hub: Hub, run: RunDir, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    result = push(hub, tmp_path, str(run.path), "--repo", "llamas/hum")
    assert result.returncode == 1 and "not reached" in result.stderr and "Traceback" not in result.stderr


class TestBeforeAnythingIsSent:
    """No network: these run where the suite has switched the Hub off."""

    def test_a_dry_run_lists_files_with_sizes_and_hashes(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["push", str(run.path), "--repo", "llamas/hum", "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        data = (run.merged / "model.safetensors").read_bytes()
        expected = [f"{len(data):,}", "sha256", hashlib.sha256(data).hexdigest(), "model.safetensors"]
        assert expected in [line.split() for line in lines]
        assert not any(name in line for line in lines for name in ("manifest.json", "recipe.yaml", "rows.jsonl", "log"))

    def test_a_damaged_folder(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        victim = run.merged / "model.safetensors"
        victim.write_bytes(victim.read_bytes()[:-1])
        assert cli.main(["push", str(run.path), "--repo", "llamas/hum", "--dry-run"]) == 2
        assert str(victim) in capsys.readouterr().err

    def test_a_run_that_is_not_done(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        run.write_state("running", 1)
        assert cli.main(["push", str(run.path), "--repo", "llamas/hum", "--dry-run"]) == 2
        assert "running" in capsys.readouterr().err

    def test_a_secret_on_the_card(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        card = run.merged / "README.md"
        card.write_text(card.read_text() + f"\nask with {TOKEN}\n")
        assert cli.main(["push", str(run.path), "--repo", "llamas/hum", "--dry-run"]) == 2
        out, err = capsys.readouterr()
        assert "README.md" in err and TOKEN not in out + err

    @pytest.mark.parametrize("repo", ["hum", "llamas/hum/more", "../hum", "https://huggingface.co/llamas/hum"])
    def test_no_name_of_a_repository(self, repo: str, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["push", str(run.path), "--repo", repo, "--dry-run"]) == 2
        assert "OWNER/NAME" in capsys.readouterr().err

    def test_an_adapter_of_pefts_gets_a_card(
        self, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lone = tmp_path / "elsewhere" / "lone"
        lone.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(run.adapter / name, lone)
        assert cli.main(["push", str(lone), "--repo", "llamas/hum", "--dry-run", "--base", "a/b"]) == 0
        assert "README.md" in capsys.readouterr().out
