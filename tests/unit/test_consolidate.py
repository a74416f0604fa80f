"""A full fine-tune's checkpoint becomes a model that transformers loads, from the checkpoint's folder alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch import cli
from launch.export import merge
from tests.unit.export_toys import make_run
from tests.unit.test_bad_input import Refuses, flip_a_bit
from trainer.checkpoint.layout import RunDir, read_manifest, write_atomically, write_manifest
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import CheckpointConfig, RunConfig
from trainer.errors import EXIT_FAILURE, PacktrainError, UserError
from trainer.export.consolidate import consolidate
from trainer.export.result import Finish, finish_adapter, finish_full, write_result
from trainer.launchers import World
from trainer.model.load import load_model
from trainer.model.tokenizer import load_tokenizer
from trainer.processes import Processes
from trainer.recipe import dump_recipe

Recipe = Callable[..., RunConfig]
CPU = torch.device("cpu")


def save(run: RunDir, state: dict[str, torch.Tensor], finish: Finish, step: int = 1, is_best: bool = False) -> None:
    checkpoints = CheckpointManager(run, CheckpointConfig(), {}, Processes(World(), CPU), finish)
    checkpoints.save(step, state, {}, is_best)
    checkpoints.close()


def full_run(path: Path, config: RunConfig, step: int = 1, is_best: bool = False) -> Any:
    """A run with a checkpoint of a model moved by random numbers, moments and all; returns that model."""
    run = RunDir(path)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    state |= {f"optim.{name}.exp_avg": torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    write_atomically(run.recipe, dump_recipe(config))
    run.write_state("running", step)
    save(run, state, finish_full(config, model.config, load_tokenizer(config.model)), step, is_best)
    return model


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_model(folder: Path, model: Any) -> None:
    """By weights and by logits; and nothing else is in the folder's files."""
    weights = dict(model.named_parameters())
    found = tensors_in(folder)
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_alone_becomes_the_model(
    tied: bool, tmp_path: Path, toy_recipe: Recipe, toy_model_dir: Path, toy_tied_model_dir: Path
) -> None:
    """Neither base nor run are there any more, as on another machine."""
    base = tmp_path / "base"
    shutil.copytree(toy_tied_model_dir if tied else toy_model_dir, base)
    model = full_run(tmp_path / "run", toy_recipe(model={"path": str(base), "dtype": "float32"}))
    shutil.copytree(RunDir(tmp_path / "run").step_dir(1), tmp_path / "elsewhere")
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "run")

    report = consolidate(tmp_path / "elsewhere", tmp_path / "out")
    assert_same_model(tmp_path / "out", model)
    assert report.tensors == len(list(model.named_parameters())) and report.step == 1
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id is not None


def test_many_files_have_an_index(tmp_path: Path, toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.export.shards.SHARD_BYTES", 60_000)
    model = full_run(tmp_path / "run", toy_recipe())
    consolidate(RunDir(tmp_path / "run").step_dir(1), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert_same_model(tmp_path / "out", model)


def test_weights_are_rounded_to_the_recipes_dtype(tmp_path: Path, toy_recipe: Recipe, toy_model_dir: Path) -> None:
    model = full_run(tmp_path / "run", toy_recipe(model={"path": str(toy_model_dir), "dtype": "bfloat16"}))
    consolidate(RunDir(tmp_path / "run").step_dir(1), tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in model.named_parameters())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from trainer.export.consolidate import consolidate

def anonymous_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

source, out = map(Path, sys.argv[1:])
consolidate(source.with_name("small"), out.with_name("small_out"))
before, peak, done = anonymous_mib(), 0.0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_mib())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
consolidate(source, out)
done = True
watcher.join()
print(peak - before)
"""


def test_memory_holds_two_tensors_and_never_the_model(tmp_path: Path) -> None:
    """8 tensors of 64 MiB, as files of 32 MiB each; what the allocator keeps for itself comes on top."""

    def finish(folder: Path, saved: Any) -> None:
        (folder / "serving").mkdir()
        config = {"dtype": "bfloat16", "num_key_value_heads": 2, "head_dim": 16}
        (folder / "serving" / "config.json").write_text(json.dumps(config))

    for name, size in {"small": 16, "large": 2**24}.items():
        run = RunDir(tmp_path / f"run_{name}")
        save(run, {f"model.{index}": torch.full((16, size // 16), float(index)) for index in range(8)}, finish)
        run.step_dir(1).rename(tmp_path / name)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "large"), str(tmp_path / "out")]
    used = subprocess.run(command, capture_output=True, text=True)
    assert (used.returncode, used.stderr) == (0, "")  # nor does torch warn of processes that nobody asked for
    assert 64 < float(used.stdout) < 2 * 64 + 40
    assert torch.equal(tensors_in(tmp_path / "out")["7"], torch.full((16, 2**20), 7.0).bfloat16())


class TestTheCommand:
    def test_a_runs_best_checkpoint_else_its_newest(self, tmp_path: Path, toy_recipe: Recipe) -> None:
        models = [full_run(tmp_path / "run", toy_recipe(), step, is_best=step == 2) for step in (1, 2, 3)]
        merge(tmp_path / "run", out=tmp_path / "best")
        assert_same_model(tmp_path / "best", models[1])
        (tmp_path / "run" / "best").unlink()
        merge(tmp_path / "run", out=tmp_path / "newest")
        assert_same_model(tmp_path / "newest", models[2])
        merge(RunDir(tmp_path / "run").step_dir(1), out=tmp_path / "first")
        assert_same_model(tmp_path / "first", models[0])

    def test_an_adapters_checkpoint_is_merged(self, tmp_path: Path, toy_recipe: Recipe) -> None:
        run = RunDir(make_run(tmp_path / "run", toy_recipe(adapter={"r": 4})))
        merge(run.path, out=tmp_path / "of_run")
        shutil.rmtree(run.adapter)
        merge(run.step_dir(1), out=tmp_path / "of_step")
        of_run, of_step = tensors_in(tmp_path / "of_run"), tensors_in(tmp_path / "of_step")
        assert set(of_run) == set(of_step) and all(torch.equal(of_run[name], of_step[name]) for name in of_run)

    def test_without_a_place_says_where_the_finished_model_lies(
        self, tmp_path: Path, toy_recipe: Recipe, refuses: Refuses
    ) -> None:
        config, run = toy_recipe(), RunDir(tmp_path / "run")
        full_run(run.path, config, 3)
        place = f"--out {run.path / 'merged-step_00000003'}"
        assert "already" not in refuses(["merge", run.path], "--out: not given", place)
        write_result(run, 3, config, load_tokenizer(config.model))
        refuses(["merge", run.path], f"finished model lies in {run.model} already, of step 3", "use that one", place)
        assert cli.main(["merge", str(run.path), *place.split()]) == 0

    def test_lies_where_no_training_writes(self, tmp_path: Path, toy_recipe: Recipe, refuses: Refuses) -> None:
        base = shutil.copytree(toy_recipe().model.path, tmp_path / "base")
        run = RunDir(tmp_path / "run")
        full_run(run.path, toy_recipe(model={"path": str(base), "dtype": "float32"}))
        flip_a_bit(next((run.step_dir(1) / "dcp").glob("*.distcp")))  # which hashing the checkpoint would find
        copy = shutil.copytree(run.step_dir(1), tmp_path / "copy")
        for place in ("model", "model/x", "checkpoints/x", "checkpoints/step_00000001/x", "merged", "logs/x"):
            refuses(["merge", run.path, "--out", run.path / place], "--out: ", "merged-NAME, a folder outside")
        refuses(["merge", run.path, "--out", base / "x"], f"{base / 'x'} lies inside {base}")
        refuses(["merge", copy, "--out", copy / "x"], f"{copy / 'x'} lies inside {copy}")


class TestVerifying:
    """What of a full fine-tune's model can be proven is; what was planted is found."""

    @pytest.fixture
    def run(self, tmp_path: Path, toy_recipe: Recipe, toy_model_dir: Path) -> RunDir:
        """A finished run, whose model is rounded."""
        config, run = toy_recipe(model={"path": str(toy_model_dir), "dtype": "bfloat16"}), RunDir(tmp_path / "run")
        full_run(run.path, config, 2)
        write_result(run, 2, config, load_tokenizer(config.model))
        return run

    def verify(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
        capsys.readouterr()
        assert cli.main(["verify", str(folder)]) == 0
        return capsys.readouterr().out

    def test_says_what_is_proven(self, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        merge(run.path, out=tmp_path / "out")
        for folder, named in ((run.path, run.model), (run.model, run.model), (tmp_path / "out", tmp_path / "out")):
            said = self.verify(folder, capsys)
            assert re.match(rf"{named}: \d+ files .* as they were written at step 2", said)
            assert said.count(f"of {run.step_dir(2)}") == 2 and "not compared" not in said
        shutil.rmtree(run.checkpoints)
        for folder in (run.path, tmp_path / "out"):
            said = self.verify(folder, capsys)
            assert "as they were written at step 2" in said and "not compared with what was trained" in said

    def test_a_checkpoint_of_another_training_is_not_compared_with(
        self, run: RunDir, tmp_path: Path, toy_recipe: Recipe, capsys: pytest.CaptureFixture[str]
    ) -> None:
        merge(run.path, out=tmp_path / "out")
        shutil.rmtree(run.path)
        full_run(run.path, toy_recipe(optim={"lr": 1e-5}), 2)
        assert "not compared with what was trained" in self.verify(tmp_path / "out", capsys)

    def test_of_another_run_it_is_not_this_runs_model(
        self, run: RunDir, tmp_path: Path, toy_recipe: Recipe, toy_model_dir: Path, refuses: Refuses
    ) -> None:
        """Of the same step, and copied there with its manifest, all hashes in it being right."""
        config, other = toy_recipe(model={"path": str(toy_model_dir), "dtype": "float32"}), RunDir(tmp_path / "other")
        full_run(other.path, config, 2)
        write_result(other, 2, config, load_tokenizer(config.model))
        own = run.model.rename(tmp_path / "own")
        shutil.copytree(other.model, run.model)
        run.write_state("done", 2)
        for command in (["verify"], ["generate", "--prompt", "a"], ["push", "--repo", "a/b", "--dry-run"]):
            refuses([command[0], run.path, *command[1:]], f"{run.model}: made by another training", "fix: delete")
        shutil.rmtree(run.model)
        own.rename(run.model)
        assert cli.main(["verify", str(run.path)]) == 0

    @pytest.mark.parametrize("entry", [{}, [], {"bytes": "1", "blake3": ""}])
    def test_a_manifest_without_hashes_is_named(self, entry: Any, run: RunDir, refuses: Refuses) -> None:
        manifest = read_manifest(run.model)
        manifest["files"]["config.json"] = entry
        (run.model / "manifest.json").write_text(json.dumps(manifest))
        for command in (["verify"], ["generate", "--prompt", "a"]):
            texts = ("manifest.json: no readable manifest (of config.json it has no size and hash)",)
            refuses([command[0], run.path, *command[1:]], *texts, status=EXIT_FAILURE)

    def test_damage_is_an_error(self, run: RunDir, refuses: Refuses) -> None:
        flip_a_bit(run.model / "model.safetensors")
        refuses(["verify", run.path], "model.safetensors does not have the hash", "fix: ", status=EXIT_FAILURE)
        (run.model / "tokenizer.json").unlink()
        write_manifest(run.model, {"kind": "model", "step": 2})
        texts = ("tokenizer: cannot be loaded", "fix: delete")
        refuses(["verify", run.model], *texts, status=EXIT_FAILURE)

    def test_what_the_hashes_do_not_give_away(self, run: RunDir, refuses: Refuses) -> None:
        def refuse(*texts: str) -> None:
            write_manifest(run.model, {"kind": "model", "step": 2})
            refuses(["verify", run.path], f"{run.model} is not the model that was trained", *texts, status=EXIT_FAILURE)

        weights = run.model / "model.safetensors"
        tensors = load_file(weights)
        changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.01}
        save_file(changed, weights, metadata={"format": "pt"})
        refuse("- model.norm.weight is not the tensor that the checkpoint holds")
        save_file({n: t for n, t in changed.items() if n != "lm_head.weight"}, weights, metadata={"format": "pt"})
        refuse("- lm_head.weight: shape none, and its config asks for [")
        save_file(tensors, weights, metadata={"format": "pt"})
        settings = run.model / "generation_config.json"
        settings.write_text(settings.read_text().replace("eos_token_id", "bos_token_id"))
        refuse("- generation_config.json is not the one that the checkpoint holds")

    def test_nothing_finished(self, tmp_path: Path, toy_recipe: Recipe, refuses: Refuses) -> None:
        full_run(tmp_path / "run", toy_recipe())
        refuses(["verify", tmp_path / "run"], "holds no model", "let `packtrain train` finish")


class TestTheResult:
    def test_of_a_full_fine_tune_is_the_model_of_that_step(self, tmp_path: Path, toy_recipe: Recipe) -> None:
        config, run = toy_recipe(), RunDir(tmp_path / "run")
        models = [full_run(run.path, config, step) for step in (1, 2)]
        for step, model in ((2, models[1]), (1, models[0])):  # the second takes the place of the first
            write_result(run, step, config, load_tokenizer(config.model))
            assert_same_model(run.model, model)
        assert not list(run.path.glob("*.unfinished"))

    def test_of_an_adapter_is_what_peft_loads(self, tmp_path: Path, toy_recipe: Recipe) -> None:
        """The weights that were saved, not those that the model has by then."""
        from peft import PeftModel

        config, run = toy_recipe(adapter={"r": 4}), RunDir(tmp_path / "run")
        model: Any = load_model(config, CPU).model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * parameter.requires_grad
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        wanted = model(ids).logits
        state = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 - parameter.requires_grad * 1.0)
        save(run, state, finish_adapter(config, model, load_tokenizer(config.model)))
        write_result(run, 1, config, load_tokenizer(config.model))

        base: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(run.adapter)).eval()
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        tokenizer: Any = AutoTokenizer.from_pretrained(run.adapter)
        assert tokenizer.chat_template


class TestRefusals:
    @pytest.fixture
    def step(self, tmp_path: Path, toy_recipe: Recipe) -> Path:
        full_run(tmp_path / "run", toy_recipe())
        return RunDir(tmp_path / "run").step_dir(1)

    def refuse(self, kind: type[PacktrainError], checkpoint: Path, match: str) -> None:
        out = checkpoint.parents[2] / "out"
        with pytest.raises(kind, match=match):
            consolidate(checkpoint, out)
        assert not list(out.parent.glob("out*"))

    def test_damaged_file(self, step: Path) -> None:
        file = next((step / "dcp").glob("*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        self.refuse(PacktrainError, step, f"{file} does not have the hash.*\n.*fix: take another")

    def test_missing_manifest(self, step: Path) -> None:
        (step / "manifest.json").unlink()
        self.refuse(PacktrainError, step, "manifest.json.*\n.*fix: take another")

    def test_an_adapters_checkpoint(self, tmp_path: Path, toy_recipe: Recipe) -> None:
        config = toy_recipe(adapter={"r": 4})
        model: Any = load_model(config, CPU).model
        state = {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save(RunDir(tmp_path / "run"), state, finish_adapter(config, model, load_tokenizer(config.model)))
        self.refuse(UserError, RunDir(tmp_path / "run").step_dir(1), "the checkpoint of an adapter")

    def test_no_checkpoint(self, step: Path, toy_model_dir: Path) -> None:
        self.refuse(UserError, step.parent, "no checkpoint")
        with pytest.raises(UserError, match="no checkpoint"):
            consolidate(toy_model_dir, step.parents[2] / "out")

    def test_no_weights(self, step: Path) -> None:
        shutil.rmtree(step / "serving")
        write_manifest(step, {"step": 1})
        self.refuse(UserError, step, "fix:")

    def test_existing_folder_is_not_written_over(self, step: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match="exists"):
            consolidate(step, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
