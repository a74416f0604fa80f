"""The gate passes an engine that serves what was trained and catches one that does not; a stand-in of vLLM serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.demo import chat_rows, write_jsonl
from tests.unit.export_toys import make_run, teach
from tests.unit.test_merge import NF4
from tests.unit.vllm_stand_in import STAND_INS, stand_in
from trainer.checkpoint.layout import read_manifest, write_manifest
from trainer.checkpoint.result import find_result
from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.merge import BaseKind, merge_adapter
from trainer.export.parity import MAX_MEAN_DIFFERENCE, check_parity
from trainer.export.verify import MAX_LOGIT_ERROR, MAX_ROUNDED_OTHERWISE, verify_export
from trainer.model.adapter_files import load_adapter
from trainer.servable import CannotServe, Servable, find_servable
from trainer.vllm_job import Job, Served, serve_in_child

__all__ = ["stand_in"]
LORA: dict[str, Any] = {"r": 4, "alpha": 32.0}
Make = Callable[..., Path]
TENFOLD = 10 * MAX_MEAN_DIFFERENCE
NEVER_READY = """
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "60"])
started = pathlib.Path(os.environ["STARTED"])
started.with_suffix(".tmp").write_text(f"{os.getpid()} {child.pid}")
started.with_suffix(".tmp").rename(started)
time.sleep(60)
"""


def _interrupt_when(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def wait_for_end(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def serve(job: Job) -> Served:
    """The engine in this process: a child would import transformers once more for every test."""
    from trainer.vllm_engine import run_job

    return run_job(job)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture
def base(made: Path, toy_model_dir: Path) -> Path:
    """The toy, taught to follow instructions somewhat, so that an adapter can change what it says."""
    folder = made / "base"
    if not folder.exists():
        model: Any = AutoModelForCausalLM.from_pretrained(toy_model_dir)
        tokenizer: Any = AutoTokenizer.from_pretrained(toy_model_dir)
        teach(model, tokenizer, list(chat_rows(24, seed=2)), steps=40, lr=1e-2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_of(made: Path, base: Path, tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> Make:
    """Makes a copy of a LoRA or QLoRA run that has learnt to answer otherwise, with its merge."""

    def make(quantized: bool = False) -> Path:
        if quantized and not (made / "lora").exists():
            make()
        place = made / ("qlora" if quantized else "lora")
        if not place.exists():
            rows = [
                {"messages": [row["messages"][0], {"role": "assistant", "content": "no, no"}]}
                for row in chat_rows(24, seed=3)
            ]
            source = {"path": str(write_jsonl(made / "rows.jsonl", rows)), "format": "messages"}
            config = toy_recipe(
                model={"path": str(base), "dtype": "bfloat16"},
                adapter=LORA,
                quantization=NF4 if quantized else None,
                data={"train": [source], "split": {"validation": 0.25}, "pack_length": 128},
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(base)
            learnt = made / "lora" / "adapter"

            def train(model: Any) -> None:
                if learnt.exists():
                    load_adapter(model, learnt, config.adapter)
                else:
                    teach(model, tokenizer, rows, steps=20, lr=1e-2)

            make_run(place, config, train=train)
            merge_adapter(place, place / "merged")
        copy = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(place, copy)
        return copy

    return make


def catch(folder: Path, match: str) -> str:
    with pytest.raises(PacktrainError, match=match) as caught:
        check_parity(folder, serve)
    return str(caught.value)


def mean_difference(text: str) -> float:
    return float(text.split("differ from transformers' by ")[1].split(" ")[0])


class TestRightModel:
    def test_unmerged_adapter_in_a_process_of_its_own(self, run_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
        report = check_parity(run_of() / "adapter", serve_in_child)
        assert (report.engine, report.served) == ("vLLM stand-in", "the adapter, unmerged")
        assert report.prompts == "6 validation rows and 18 train rows and 76 fixed prompts"
        assert report.conversations == 100
        assert report.mean_difference < MAX_MEAN_DIFFERENCE / 4
        assert report.effect is not None and report.effect > TENFOLD
        assert report.stopped == 1.0

    def test_an_interrupt_ends_that_process_and_those_it_has_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "vllm.py").write_text(NEVER_READY)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        started = tmp_path / "started"
        monkeypatch.setenv("STARTED", str(started))
        threading.Thread(target=lambda: _interrupt_when(started.exists), daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            serve_in_child(Job(Servable("m", "m", "float32", {}), [], [], 1, 8, []))
        for pid in map(int, started.read_text().split()):
            assert wait_for_end(pid), f"process {pid} is left"

    @pytest.mark.usefixtures("stand_in")
    def test_merged_qlora_and_its_dequantised_base(self, run_of: Make) -> None:
        run = run_of(quantized=True)
        assert find_servable(find_result(run)).model == str(run / "merged")  # not the adapter on the 16-bit base
        report = check_parity(run, serve)
        assert report.served == "the merged model"
        assert report.mean_difference < MAX_MEAN_DIFFERENCE / 4
        assert report.effect is not None and report.effect > TENFOLD

    @pytest.mark.usefixtures("stand_in")
    def test_plain_model_without_recipe_is_asked_fixed_prompts(self, base: Path) -> None:
        report = check_parity(base, serve)
        assert (report.prompts, report.effect, report.stopped) == ("100 fixed prompts", None, None)


@pytest.mark.usefixtures("stand_in")
class TestWrongEngine:
    """The folder is right; what the engine makes of it is not."""

    def test_adapter_passed_over(self, run_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_STAND_IN_FAULT", "adapter ignored")
        text = catch(run_of() / "adapter", "the adapter is not applied")
        assert mean_difference(text) > TENFOLD
        assert "differ by 0 nats on average with and without the adapter" in text
        assert "the likeliest token is another one" in text

    def test_scaling_forgotten(self, run_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_STAND_IN_FAULT", "scaling forgotten")
        assert mean_difference(catch(run_of() / "adapter", "log-probabilities differ")) > TENFOLD

    def test_second_bos_and_stop_token_unknown(self, run_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        run = run_of()
        monkeypatch.setenv("VLLM_STAND_IN_FAULT", "second BOS")
        assert "of 100 of 100 conversations" in catch(run, "two BOS tokens, from token 1 on")
        monkeypatch.setenv("VLLM_STAND_IN_FAULT", "no stop")
        assert catch(run, "run past the stop token").count("- ") == 1


@pytest.mark.usefixtures("stand_in")
class TestWrongFolder:
    """The engine is right; the folder is another model than was trained. Hashes are written anew."""

    def test_template_with_a_second_bos(self, run_of: Make) -> None:
        merged = run_of() / "merged"
        file = merged / "chat_template.jinja"
        file.write_text("{{ bos_token }}" + file.read_text())
        write_manifest(merged, read_manifest(merged))
        catch(merged, "two BOS tokens")

    def test_nothing_merged(self, run_of: Make, base: Path) -> None:
        merged = run_of() / "merged"
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
        write_manifest(merged, read_manifest(merged))
        catch(merged, "differ by 0.* nats on average between the model and its base, at least 0.06 is needed")

    def test_adapter_with_a_wrong_prefix(self, run_of: Make) -> None:
        file = run_of() / "adapter" / "adapter_model.safetensors"
        save_file({name.replace("base_model.", "", 1): t for name, t in load_file(file).items()}, file)
        with pytest.raises(UserError, match="adapter_model.safetensors"):
            check_parity(file.parent, serve)

    def test_another_revision_of_the_base(self, run_of: Make, base: Path, tmp_path: Path) -> None:
        run, file = run_of(), base / "model.safetensors"
        shutil.copy(file, tmp_path / "as_trained")
        try:
            tensors = load_file(file)
            save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
            for folder in (run / "adapter", run / "merged"):
                with pytest.raises(PacktrainError, match="content hash"):
                    check_parity(folder, serve)
        finally:
            shutil.copy(tmp_path / "as_trained", file)


class TestWrongMerge:
    """Engine and transformers agree on a folder that was merged wrongly: that it is wrong is `verify`'s to find."""

    def catch_merge(self, run: Path, wrong: Path) -> tuple[float, float]:
        """Puts the weights of `wrong` into the run's merge.

        Returns:
            Largest share of a tensor's elements that are wrong, and the error of the logits.
        """
        shutil.copy(wrong / "model.safetensors", run / "merged")
        write_manifest(run / "merged", read_manifest(run / "merged"))
        with pytest.raises(PacktrainError, match="elements differ from PEFT's float32 merge") as caught:
            verify_export(run)
        text = str(caught.value)
        counts = re.findall(r"weight: ([0-9,]+) of ([0-9,]+) elements differ", text)
        shares = [int(wrong.replace(",", "")) / int(of.replace(",", "")) for wrong, of in counts]
        logits = re.search(r"logits differ from base \+ adapter by ([0-9.e+-]+)", text)
        return max(shares), float(logits[1]) if logits else 0.0

    def test_scaling_forgotten(self, run_of: Make, tmp_path: Path) -> None:
        run, other = run_of(quantized=True), run_of(quantized=True)
        for folder in (other / "adapter", other / "checkpoints/step_00000001/adapter"):
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["r"]}))
        recipe = (other / "recipe.yaml").read_text()
        (other / "recipe.yaml").write_text(re.sub(r"alpha: .*", f"alpha: {config['r']}.0", recipe))
        merge_adapter(other, tmp_path / "wrong")
        share, logits = self.catch_merge(run, tmp_path / "wrong")
        assert share > 10 * MAX_ROUNDED_OTHERWISE
        assert logits > 10 * MAX_LOGIT_ERROR

    @pytest.mark.parametrize("bases", [("dequantized", "original"), ("original", "dequantized")])
    def test_the_other_base(self, run_of: Make, tmp_path: Path, bases: tuple[BaseKind, BaseKind]) -> None:
        run = run_of(quantized=True)
        shutil.rmtree(run / "merged")
        merge_adapter(run, run / "merged", bases[0])
        merge_adapter(run, tmp_path / "wrong", bases[1])
        share, _ = self.catch_merge(run, tmp_path / "wrong")
        assert share > 10 * MAX_ROUNDED_OTHERWISE


def test_what_vllm_would_make_another_model_of_is_not_served(run_of: Make, tmp_path: Path) -> None:
    """Nothing of it is loaded: the reason comes from the files."""
    run = run_of(quantized=True)
    shutil.rmtree(run / "merged")
    with pytest.raises(CannotServe, match="trained on a base in nf4, and the 16-bit one is another model"):
        find_servable(find_result(run))
    run = run_of()
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "alpha_pattern": {"q_proj": 64}}))
    with pytest.raises(UserError, match="alpha_pattern .*\n.*not set, by the recipe"):
        find_servable(find_result(run / "adapter"))
    lone = shutil.copytree(run / "adapter", tmp_path / "lone")
    with pytest.raises(CannotServe, match="vLLM applies no adapter with alpha_pattern"):
        find_servable(find_result(lone))
