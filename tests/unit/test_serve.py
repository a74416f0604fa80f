"""`packtrain serve`, with a stand-in for vLLM: real processes, real requests, real signals; nothing is left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launch import cli, serve, server
from launch.serving import choose_num_gpus
from tests.unit.export_toys import make_run
from trainer.checkpoint.layout import RunDir, read_manifest
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.export.merge import merge_adapter
from trainer.export.result import write_result
from trainer.model.tokenizer import load_tokenizer

Recipe = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]
WAIT = 30.0  # seconds until a test gives up
LORA = {"r": 4, "alpha": 16.0}
# Options that vLLM 0.25.1 and 0.32.0 both have: vllm/engine/arg_utils.py, and FrontendArgs in
# vllm/entrypoints/openai/cli_args.py or vllm/entrypoints/launchers/cli_args.py.
IN_ALL_VLLM = {
    "--dtype",
    "--enable-lora",
    "--generation-config",
    "--gpu-memory-utilization",
    "--host",
    "--lora-modules",
    "--max-lora-rank",
    "--max-model-len",
    "--port",
    "--revision",
    "--served-model-name",
    "--tensor-parallel-size",
    "--tokenizer",
}


def finished_run(path: Path, config: RunConfig, merged: bool = True) -> RunDir:
    """As a training leaves it that is done."""
    run = RunDir(make_run(path, config))
    write_result(run, 1, config, load_tokenizer(config.model))
    if merged:
        merge_adapter(run.path, run.merged)
    run.write_state("done", 1)
    return run


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path, toy_rows_file: Path) -> RunDir:
    model, source = {"path": str(toy_model_dir), "dtype": "float32"}, {"path": str(toy_rows_file), "format": "messages"}
    config = RunConfig.model_validate({"model": model, "adapter": LORA, "data": {"train": [source]}})
    return finished_run(tmp_path_factory.mktemp("runs") / "llama", config)


@pytest.fixture
def run(tmp_path: Path, lora_run: RunDir) -> RunDir:
    """A test's own copy."""
    return RunDir(shutil.copytree(lora_run.path, tmp_path / "llama"))


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Vllm:
    """The stand-in on PATH; what it noted of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def started(self) -> dict[str, Any]:
        return json.loads((self.folder / "started.json").read_text())

    def request(self) -> dict[str, Any]:
        return json.loads((self.folder / "request.json").read_text())

    def is_gone(self) -> bool:
        """Whether it and its child have ended, and so are not even zombies of ours."""
        deadline = time.monotonic() + WAIT
        while any(is_alive(pid) for pid in self.started()["pids"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_tokenizer_dir: Path) -> Iterator[Vllm]:
    """On PATH; it reads prompts as plain transformers does, with the toy's own template."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm"
    script.write_text(f"#!{sys.executable}\n" + (ROOT / "tests/unit/fake_vllm.py").read_text())
    script.chmod(0o755)
    tokenizer: Any = AutoTokenizer.from_pretrained(toy_tokenizer_dir)
    messages = [{"role": "user", "content": serve.PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))  # a vLLM beside this Python is none of ours
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(folder))
    monkeypatch.setenv("FAKE_VLLM_PROMPT_IDS", json.dumps(ids))
    for name in serve.KEYS:
        monkeypatch.delenv(name, raising=False)
    yield Vllm(folder)
    if (folder / "started.json").exists():
        for pid in filter(is_alive, Vllm(folder).started()["pids"]):
            os.kill(pid, signal.SIGKILL)


def send_when(number: int, ready: Callable[[], bool], times: int = 1) -> None:
    """Signals this process once `ready`, as a terminal or a job's end would; and again after a while."""

    def wait() -> None:
        deadline = time.monotonic() + WAIT
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=wait, daemon=True).start()


def printed_command(capsys: pytest.CaptureFixture[str], *tokens: str) -> list[str]:
    assert cli.main(["serve", *tokens, "--print"]) == 0
    return shlex.split(capsys.readouterr().out)


def options_of(command: list[str]) -> dict[str, str]:
    return {name: value for name, value in pairwise(command) if name.startswith("--")}


class TestServes:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_until_it_is_asked_to_stop(
        self, number: int, run: RunDir, port: int, vllm: Vllm, capfd: pytest.CaptureFixture[str]
    ) -> None:
        send_when(number, (vllm.folder / "request.json").exists)
        assert cli.main(["serve", str(run.path), "--port", str(port), "--", "--enforce-eager"]) == 0
        assert vllm.is_gone()
        arguments = vllm.started()["arguments"]
        assert arguments[:2] == ["serve", str(run.merged)] and arguments[-1] == "--enforce-eager"
        assert vllm.request()["path"] == "/v1/chat/completions" and vllm.request()["model"] == "llama"

    def test_says_how_to_ask_and_never_what_the_key_is(
        self, run: RunDir, port: int, vllm: Vllm, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PACKTRAIN_API_KEY", "sesame-open")
        said = threading.Event()
        monkeypatch.setattr(server.Server, "wait", lambda self: said.set())
        assert cli.main(["serve", str(run.path), "--port", str(port), "--host", "0.0.0.0"]) == 0
        out, err = capfd.readouterr()
        assert said.is_set() and vllm.started()["key"] == "sesame-open"
        assert f"http://127.0.0.1:{port}/v1" in out and "curl" in out
        assert "sesame-open" not in out + err + " ".join(vllm.started()["arguments"])
        assert "$PACKTRAIN_API_KEY" in out and "the key is ***" in err

    def test_a_server_that_hangs_is_killed(
        self, run: RunDir, port: int, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_VLLM", "hangs")
        monkeypatch.setattr(server, "SECONDS_TO_STOP", 0.5)
        send_when(signal.SIGTERM, (vllm.folder / "request.json").exists)
        assert cli.main(["serve", str(run.path), "--port", str(port)]) == 0
        assert vllm.is_gone()

    def test_a_second_ctrl_c_does_not_wait(
        self, run: RunDir, port: int, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_VLLM", "hangs")
        send_when(signal.SIGINT, (vllm.folder / "request.json").exists, times=2)
        started = time.monotonic()
        assert cli.main(["serve", str(run.path), "--port", str(port)]) == 0
        assert vllm.is_gone() and time.monotonic() - started < server.SECONDS_TO_STOP / 2

    def test_nothing_outlives_a_killed_packtrain(self, tmp_path: Path, vllm: Vllm, port: int) -> None:
        """But what vLLM itself leaves behind: it is asked to end, and given no more than that."""
        code = f"""
            import os
            from launch.server import Server
            with Server(["vllm", "serve", "--host", "127.0.0.1", "--port", "{port}"], os.environ, []) as server:
                server.wait()
        """
        python = Path(os.readlink("/proc/self/exe"))
        environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        process = subprocess.Popen([python, "-c", textwrap.dedent(code)], env=environ)
        deadline = time.monotonic() + WAIT
        while not (vllm.folder / "started.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        process.kill()
        process.wait()
        pid = vllm.started()["pids"][0]
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(pid)


class TestTellsWhatIsWrong:
    @pytest.mark.parametrize(
        ("mode", "status", "said"),
        [
            ("dies at start", 1, ["ended with status 3; the first error it named: ValueError: No available memory"]),
            ("never healthy", 1, ["does not answer after 1 s", "--wait"]),
            ("dies when asked", 1, ["illegal memory access"]),
            ("double BOS", 1, ["not as in training", "BOS may be there twice"]),
            ("double BOS without ids", 1, ["not as in training", "BOS may be there twice"]),
        ],
    )
    def test_of_the_server(
        self,
        mode: str,
        status: int,
        said: list[str],
        run: RunDir,
        port: int,
        vllm: Vllm,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("FAKE_VLLM", mode)
        started = time.monotonic()
        wait = "1" if mode == "never healthy" else str(WAIT)
        assert cli.main(["serve", str(run.path), "--port", str(port), "--wait", wait]) == status
        err = capfd.readouterr().err
        assert all(text in err for text in said), err
        assert "serving" not in err and vllm.is_gone() and time.monotonic() - started < WAIT

    def test_ctrl_c_before_it_answers(
        self, run: RunDir, port: int, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_VLLM", "never healthy")
        send_when(signal.SIGINT, (vllm.folder / "started.json").exists)
        assert cli.main(["serve", str(run.path), "--port", str(port)]) == cli.INTERRUPTED
        assert vllm.is_gone()

    def test_a_port_that_is_taken(self, run: RunDir, vllm: Vllm, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert cli.main(["serve", str(run.path), "--port", str(port)]) == 2
        assert f"--port: {port} on 127.0.0.1" in capsys.readouterr().err
        assert not (vllm.folder / "started.json").exists()

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
    def test_a_host_that_others_reach_needs_a_key(
        self, host: str, run: RunDir, vllm: Vllm, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["serve", str(run.path), "--host", host]) == 2
        assert "PACKTRAIN_API_KEY" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--api-key=x", "--api_key", "--port", "--tensor-parallel-size", "-tp"])
    def test_options_that_packtrain_sets_itself(
        self, option: str, run: RunDir, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["serve", str(run.path), "--print", "--", option, "x"]) == 2
        assert option.partition("=")[0] in capsys.readouterr().err

    def test_an_option_nobody_knows(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["serve", str(run.path), "--print", "--prot", "8001"]) == 2
        assert cli.main(["serve", str(run.path), "other", "--print"]) == 2

    def test_an_option_of_vllm_s_is_told_its_place(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["serve", str(run.path), "--print", "--enforce-eager"]) == 2
        assert "after --: packtrain serve DIR -- --enforce-eager" in capsys.readouterr().err
        assert cli.main(["serve", str(run.path), "--print", "--max-model-len", "8"]) == 2
        assert "--max-length sets" in capsys.readouterr().err

    def test_a_name_of_nothing_and_more_positions_than_the_model_has(
        self, run: RunDir, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["serve", str(run.path), "--print", "--name", " "]) == 2
        assert "--name: found ' '" in capsys.readouterr().err
        config = json.loads((run.merged / "config.json").read_text())
        most = config["max_position_embeddings"]
        (run.merged / "manifest.json").unlink()
        for factor in (1, 4):
            scaled = {"rope_theta": 10000.0, "rope_type": "linear", "factor": float(factor)}
            (run.merged / "config.json").write_text(json.dumps(config | {"rope_parameters": scaled}))
            assert cli.main(["serve", str(run.merged), "--print", "--max-length", str(factor * most)]) == 0
            assert cli.main(["serve", str(run.merged), "--print", "--max-length", str(factor * most + 1)]) == 2
            assert f"at most the model's {factor * most}" in capsys.readouterr().err

    def test_no_vllm(self, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        assert cli.main(["serve", str(run.path)]) == 2
        assert ".[serve]" in capsys.readouterr().err

    @pytest.mark.parametrize("state", ["running", "failed", "preempted"])
    def test_a_run_that_is_not_done(self, state: Any, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        run.write_state(state, 1)
        assert cli.main(["serve", str(run.path), "--print"]) == 2
        err = capsys.readouterr().err
        assert state in err and "packtrain merge" in err

    @pytest.mark.parametrize("place", ["merged", "adapter"])
    def test_a_flipped_bit(self, place: str, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        (victim,) = (run.path / place).glob("*.safetensors")
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        assert cli.main(["serve", str(run.path / place), "--print"]) == 2
        err = capsys.readouterr().err
        assert f"{victim}: does not have the hash" in err
        assert ("packtrain merge" if place == "merged" else "the run's best checkpoint counts") in err

    def test_a_merged_model_without_its_hashes(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        (run.merged / "manifest.json").unlink()
        assert cli.main(["serve", str(run.path), "--print"]) == 2
        assert "packtrain merge" in capsys.readouterr().err

    def test_a_merged_model_of_another_adapter(
        self, run: RunDir, tmp_path: Path, toy_recipe: Recipe, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = finished_run(tmp_path / "other", toy_recipe(adapter={**LORA, "r": 8}))
        shutil.rmtree(run.merged)
        shutil.copytree(other.merged, run.merged)
        assert cli.main(["serve", str(run.path), "--print"]) == 2
        assert "another adapter" in capsys.readouterr().err

    def test_an_adapter_on_four_bits_is_merged_first(
        self, tmp_path: Path, toy_recipe: Recipe, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        config = toy_recipe(model={"dtype": "bfloat16"}, adapter=LORA, quantization={"type": "nf4"})
        run = finished_run(tmp_path / "run", config, merged=False)
        assert cli.main(["serve", str(run.path), "--print"]) == 2
        assert f"packtrain merge {run.path}" in capsys.readouterr().err
        assert cli.main(["serve", str(run.adapter), "--print"]) == 0
        assert "answers otherwise" in caplog.text

    @pytest.mark.parametrize(
        ("field", "value"),
        [("use_dora", True), ("modules_to_save", ["lm_head"]), ("alpha_pattern", {"q_proj": 1}), ("r", 1024)],
    )
    def test_an_adapter_that_vllm_would_not_serve_as_it_is(
        self, field: str, value: Any, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(run.adapter, tmp_path / "lone")
        file = tmp_path / "lone" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
        (tmp_path / "lone" / "manifest.json").unlink()
        assert cli.main(["serve", str(tmp_path / "lone"), "--print"]) == 2
        assert field in (err := capsys.readouterr().err) and "packtrain merge" in err

    def test_an_adapter_in_float32_is_merged_first(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["serve", str(run.adapter), "--print"]) == 2
        assert "computes adapters in 16 bits" in (err := capsys.readouterr().err) and "packtrain merge" in err

    def test_a_decilm(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        lone = run.path / "lone"
        shutil.copytree(run.merged, lone)
        (lone / "manifest.json").unlink()
        config = json.loads((lone / "config.json").read_text())
        (lone / "config.json").write_text(json.dumps({**config, "num_key_value_heads_per_layer": [1, 2]}))
        assert cli.main(["serve", str(lone), "--print"]) == 2
        assert "DeciLM" in capsys.readouterr().err


class TestCommand:
    def test_of_a_merged_model(self, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
        command = printed_command(capsys, str(run.path), "--max-length", "64", "--port", "8123", "--gpus", "2")
        assert command[:3] == ["vllm", "serve", str(run.merged)]
        found = options_of(command)
        assert found["--dtype"] == "float32" and found["--max-model-len"] == "64" and found["--port"] == "8123"
        assert found["--tensor-parallel-size"] == "2" and found["--served-model-name"] == "llama"
        assert set(found) <= IN_ALL_VLLM
        assert "--max-model-len" not in printed_command(capsys, str(run.path))

    def test_of_an_adapter_on_its_base(
        self, tmp_path: Path, toy_recipe: Recipe, toy_model_dir: Path, capsys: Any
    ) -> None:
        """The template and the stop token trained with are the adapter's, not the base's."""
        template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|pad|>{% endfor %}"
        template += "{% if add_generation_prompt %}[assistant]{% endif %}"
        model = {"dtype": "bfloat16"}
        config = toy_recipe(model=model, adapter={"r": 20}, data={"template": template})
        run = finished_run(tmp_path / "my=run, v2", config, merged=False)
        found = options_of(command := printed_command(capsys, str(run.path), "--name", "mine"))
        assert command[2] == str(toy_model_dir) and found["--max-lora-rank"] == "32" and "--enable-lora" in command
        assert json.loads(found["--lora-modules"]) == {"name": "mine", "path": str(run.adapter)}
        assert found["--served-model-name"] == "mine-base" and set(found) <= IN_ALL_VLLM
        tokenizer: Any = AutoTokenizer.from_pretrained(found["--tokenizer"])
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert "[user]hi" in text
        settings = json.loads((Path(found["--generation-config"]) / "generation_config.json").read_text())
        assert set(settings["eos_token_id"]) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|pad|>")}

    def test_of_an_adapter_copied_out_of_its_run(
        self, tmp_path: Path, toy_recipe: Recipe, toy_model_dir: Path, capsys: Any
    ) -> None:
        """Its own manifest has the recipe: the dtype is the training's, not that of the base's files."""
        run = finished_run(tmp_path / "run", toy_recipe(model={"dtype": "bfloat16"}, adapter=LORA), merged=False)
        lone = run.adapter.rename(tmp_path / "lone")
        command = printed_command(capsys, str(lone))
        assert command[2] == str(toy_model_dir) and options_of(command)["--dtype"] == "bfloat16"

    def test_names_the_key_by_its_variable(
        self, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PACKTRAIN_API_KEY", "sesame-open")
        assert cli.main(["serve", str(run.path), "--print", "--host", "0.0.0.0"]) == 0
        out = capsys.readouterr().out
        assert out.startswith('VLLM_API_KEY="$PACKTRAIN_API_KEY" vllm serve ') and "sesame" not in out

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "asked", "visible", "chosen"),
        [
            (32, 8, None, 8, 8),
            (32, 8, None, 6, 4),
            (32, 8, 2, 8, 2),
            (32, 8, 16, 0, 16),
            (40, 40, None, 8, 8),
            (28, 4, None, 8, 4),
        ],
    )
    def test_gpus_that_the_heads_divide_by(
        self, heads: int, kv_heads: int, asked: int | None, visible: int, chosen: int
    ) -> None:
        shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": 13824}
        assert choose_num_gpus(shape | {"vocab_size": 32000}, asked, visible) == chosen

    @pytest.mark.parametrize(("asked", "visible"), [(3, 8), (16, 8), (0, 8), (-1, 0)])
    def test_gpus_that_are_not_there_or_do_not_divide(self, asked: int, visible: int) -> None:
        with pytest.raises(UserError, match="--gpus"):
            choose_num_gpus({"num_attention_heads": 32, "num_key_value_heads": 8}, asked, visible)


def test_results_of_a_run_say_what_they_are(run: RunDir) -> None:
    """The manifests of adapter and merged model, by which they are found whole, leave the card to be edited."""
    for folder in (run.adapter, run.merged):
        manifest = read_manifest(folder)
        assert "README.md" not in manifest["files"] and (folder / "README.md").exists()
        assert manifest["step"] == 1 and manifest["recipe"]["adapter"]["r"] == 4
