"""Whole runs on a tiny Llama: what they leave, how they stop, and that a resumed run is the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from trainer.checkpoint.layout import RunDir, hash_file, read_manifest
from trainer.errors import PacktrainError, Preempted, TrainingDiverged, UserError
from trainer.metrics.trackers import read_metrics

LORA = {"method": "lora", "r": 4, "alpha": 8}
NF4 = {"type": "nf4"}


def train(config, folder):
    from trainer.run import train

    train(config, folder)
    return RunDir(folder)


def records(run, kind):
    return [record for record in read_metrics(run.metrics) if record["kind"] == kind]


def losses(run):
    return [record["loss"] for record in records(run, "step")]


def saved_tensors(run, step):
    folder = run.step_dir(step) / "dcp"
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def assert_same_run(left, right, step):
    assert losses(left) == losses(right)
    a, b = saved_tensors(left, step), saved_tensors(right, step)
    assert a.keys() == b.keys() and any(name.startswith("optim.") for name in a)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def start_worker(recipe, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", str(recipe), "--run-dir", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 120
    while not run.metrics.exists() or not any(r["step"] >= step for r in records(run, "step")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_leaves_everything_a_user_looks_for(toy_recipe, tmp_path):
    config = toy_recipe(
        adapter=LORA,
        quantization=NF4,
        train={"max_steps": 12, "epochs": 8},
        eval={"every_steps": 4, "samples": ["Repeat a b."], "max_new_tokens": 4},
        checkpoint={"every_steps": 4},
        tracking={"to": ["tensorboard"]},
        export={"merge": True, "verify": True},
    )
    run = train(config, tmp_path / "run")
    assert losses(run)[-1] < losses(run)[0]
    assert [r["step"] for r in records(run, "step")] == list(range(1, 13))
    assert [r["step"] for r in records(run, "eval")] == [4, 8, 12]
    assert [r["prompt"] for r in records(run, "sample")] == ["Repeat a b."] * 3
    assert run.read_state()["state"] == "done" and run.read_state()["step"] == 12
    assert (run.adapter / "adapter_model.safetensors").exists()
    assert (run.adapter / "tokenizer_config.json").exists()
    assert (run.merged / "config.json").exists()
    assert (run.step_dir(12) / "adapter/adapter_model.safetensors").exists()
    assert read_manifest(run.step_dir(12))["recipe"] == hash_file(run.recipe)
    assert run.best.exists() and run.recipe.exists() and (run.logs / "rank_0.log").read_text()
    assert list(run.tensorboard.iterdir())


def test_one_row_is_counted_as_one(toy_recipe, tmp_path, caplog):
    caplog.set_level("INFO", "trainer")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    data = {"train": [{"path": str(rows), "format": "prompt_completion"}], "split": {}}
    run = train(toy_recipe(adapter=LORA, data=data, train={"max_steps": 1}, eval={}), tmp_path / "run")
    assert "train: 1 row in 1 pack, " in caplog.text and "train: 1 row dropped: " in caplog.text
    (text,) = [record["text"] for record in records(run, "event") if record["event"] == "start"]
    assert "1 pack of 1 row (" in text and text.endswith(", 1 step")


def test_no_step_is_trained_where_packed_documents_see_each_other(toy_recipe, tmp_path, monkeypatch):
    from trainer.model import attention

    def over_the_row(*args, cu_seq_lens_q=None, **kwargs):
        return sound(*args, **kwargs)

    sound = attention.document_attention
    monkeypatch.setitem(attention.PACKED_ATTENTION, attention.BY_DOCUMENT, over_the_row)
    with pytest.raises(PacktrainError, match="packed_by_document lets packed documents see each other"):
        train(toy_recipe(adapter=LORA), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert run.read_state()["state"] == "failed" and not run.steps() and not run.metrics.exists()


def test_a_second_start_of_a_finished_run_verifies_what_lies_there(toy_recipe, tmp_path):
    config = toy_recipe(adapter=LORA, export={"merge": True, "verify": True})
    run = train(config, tmp_path / "run")
    train(config, run.path)
    assert run.read_state()["state"] == "done"
    victim = run.merged / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(PacktrainError, match="does not have the hash"):
        train(config, run.path)
    assert run.read_state()["state"] == "failed"
    assert "Traceback" in (run.logs / "rank_0.log").read_text()


def test_a_merge_onto_another_base_than_the_recipe_asks_for_is_made_anew(toy_recipe, tmp_path):
    sections = {"adapter": LORA, "quantization": NF4}
    run = train(toy_recipe(**sections, export={"merge": True, "verify": False}), tmp_path / "run")
    assert read_manifest(run.merged)["merged_onto"] == "dequantized"
    train(toy_recipe(**sections, export={"merge": True, "verify": False, "base": "original"}), run.path)
    assert read_manifest(run.merged)["merged_onto"] == "original"


def test_a_signal_after_the_last_step_stops_before_the_merge_and_the_next_start_merges(
    toy_recipe, tmp_path, monkeypatch
):
    from trainer.export import result

    write_result = result.write_result

    def signalled(*arguments):
        write_result(*arguments)
        signal.raise_signal(signal.SIGTERM)

    config = toy_recipe(adapter=LORA, export={"merge": True})
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="before merging by SIGTERM"):
        patch.setattr(result, "write_result", signalled)
        train(config, run.path)
    assert run.read_state()["state"] == "preempted" and not run.merged.exists()
    train(config, run.path)
    assert run.read_state()["state"] == "done" and run.merged.exists()


def test_training_goes_on_while_the_best_checkpoint_of_a_step_with_a_checkpoint_is_written(
    toy_recipe, tmp_path, monkeypatch
):
    from trainer.export import result
    from trainer.loop import TrainLoop

    next_step = threading.Event()
    train_step, waited = TrainLoop.train_step, []

    def slow_finish(config, model, tokenizer):
        return lambda folder, saved: waited.append(next_step.wait(20))

    def note_step(loop):
        train_step(loop)
        if loop.state.step == 3:
            next_step.set()

    monkeypatch.setattr("trainer.run.finish_adapter", slow_finish)
    monkeypatch.setattr(TrainLoop, "train_step", note_step)
    monkeypatch.setattr(result, "write_result", lambda *arguments: None)
    config = toy_recipe(adapter=LORA, train={"max_steps": 4}, eval={"every_steps": 2}, checkpoint={"every_steps": 2})
    run = train(config, tmp_path / "run")
    assert waited[0]  # the third step was made before the checkpoint of the second was whole
    assert [record["step"] for record in records(run, "event") if record["event"] == "checkpoint"] == [2, 4]


def test_a_resumed_run_recomputes_as_asked_now(toy_recipe, tmp_path):
    def sections(recompute):
        return {"adapter": LORA, "train": {"micro_batch": "auto", "recompute": recompute}}

    run = train(toy_recipe(**sections("auto")), tmp_path / "run")
    train(toy_recipe(**sections("full")), run.path)
    texts = [r["text"] for r in records(run, "event") if r["event"] == "micro_batch"]
    assert ["recompute full" in text for text in texts] == [False, True]


def test_a_run_goes_on_with_its_activations_in_host_memory(toy_recipe, tmp_path):
    def config(steps, **train):
        train = {"max_steps": steps, "global_batch": {"rows": 1}, "recompute": "norms", **train}
        return toy_recipe(adapter=LORA, data={"pack_length": 2048}, schedule={"name": "constant"}, train=train)

    plain, run = train(config(4), tmp_path / "plain"), RunDir(tmp_path / "run")
    train(config(4, offload_activations=True), run.path)
    assert_same_run(plain, run, 4)
    train(config(4), run.path)  # it may be changed
    with pytest.raises(UserError, match="train.keep_in_float8"):
        train(config(4, keep_in_float8=True), run.path)
    float8 = train(config(4, keep_in_float8=True), tmp_path / "float8")
    assert any("gate and up kept in float8" in record["text"] for record in records(float8, "event"))
    less_exact = losses(float8)
    assert less_exact[0] == losses(run)[0] and less_exact != losses(run)
    assert less_exact == pytest.approx(losses(run), rel=1e-2)


def test_ctrl_c_twice_ends_at_once_and_says_so(toy_recipe, tmp_path, monkeypatch):
    from trainer.loop import TrainLoop

    def interrupted(loop):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainLoop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(toy_recipe(adapter=LORA), tmp_path / "run")
    assert RunDir(tmp_path / "run").read_state()["state"] == "cancelled"


def test_a_full_disk_is_named_and_can_be_mended(toy_recipe, tmp_path, monkeypatch):
    import errno

    from trainer.loop import TrainLoop

    def full(loop):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrainLoop, "train_step", full)
    with pytest.raises(PacktrainError, match=r"run: .*No space left on device\n  fix: make room"):
        train(toy_recipe(adapter=LORA), tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("trainer.run.load_weights", r"model.path: .* does not fit(.|\n)*fix: quantise the base"),
        ("trainer.loop.TrainLoop.train_step", "micro_batch"),
    ],
)
def test_a_full_gpu_is_named_with_what_to_do(toy_recipe, tmp_path, monkeypatch, where, told):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    monkeypatch.setattr(where, full)
    with pytest.raises(PacktrainError, match=told) as error:
        train(toy_recipe(adapter=LORA), tmp_path / "run")
    assert "2.00 GiB" in str(error.value) and "fix: " in str(error.value)


def test_full_fine_tuning_leaves_a_model_that_transformers_loads(toy_recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(toy_recipe(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    trained = saved_tensors(run, run.steps()[-1])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[f"model.{name}"])


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {**LORA, "dropout": 0.2}, "quantization": NF4, "optim": {"name": "adamw_8bit"}},
        {"schedule": {"name": "plateau", "patience": 0}, "train": {"recompute": "full"}},
    ],
    ids=["qlora-dropout-8bit", "full-plateau-recompute"],
)
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(toy_recipe, toy_recipe_file, tmp_path, sections):
    train_section = {"max_steps": 20, "epochs": 30, **sections.get("train", {})}
    common = {"eval": {"every_steps": 5}, "checkpoint": {"every_steps": 5, "keep": 9, "keep_best": False}}
    sections = {**sections, **common, "train": train_section}
    whole = train(toy_recipe(**sections), tmp_path / "whole")

    killed = RunDir(tmp_path / "killed")
    worker = start_worker(toy_recipe_file(**sections), killed.path)
    wait_for_step(killed, 11, worker)
    worker.kill()
    worker.wait()
    assert 10 in killed.steps() or 5 in killed.steps()
    assert len(losses(killed)) < 20
    train(toy_recipe(**sections), killed.path)
    assert_same_run(whole, killed, 20)
    assert [r["event"] for r in records(killed, "event")].count("resume") == 1


def test_a_corrupt_newest_checkpoint_costs_steps_not_the_run(toy_recipe, tmp_path, caplog):
    sections = {"adapter": LORA, "checkpoint": {"every_steps": 2, "keep": 9}, "train": {"max_steps": 6, "epochs": 9}}
    run = train(toy_recipe(**sections), tmp_path / "run")
    before, victim = losses(run), next((run.step_dir(6) / "dcp").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-7])
    train(toy_recipe(**sections), run.path)
    assert str(victim) in caplog.text
    assert losses(run) == before and run.steps()[-1] == 6


def test_a_best_checkpoint_that_is_lost_gives_way_to_the_best_of_what_comes(toy_recipe, tmp_path):
    """Else its loss, which no later evaluation may reach, would keep every later one from being kept."""
    common = {"adapter": LORA, "eval": {"every_steps": 1}, "checkpoint": {"every_steps": 1, "keep": 9}}
    run = train(toy_recipe(**common), tmp_path / "run")
    manifest = json.loads((run.step_dir(3) / "manifest.json").read_text())
    manifest["progress"]["loop"]["best_loss"] = 0.0  # as if an earlier evaluation had been unbeatable
    (run.step_dir(3) / "manifest.json").write_text(json.dumps(manifest))
    run.best.write_text("step_00000099\n")
    shutil.rmtree(run.step_dir(4))
    train(toy_recipe(**common), run.path)
    assert run.best.read_text().strip() == run.step_dir(4).name


def test_sigterm_saves_and_exits_75_and_the_next_start_goes_on(toy_recipe, toy_recipe_file, tmp_path):
    sections = {"adapter": LORA, "train": {"max_steps": 150, "epochs": 150}}
    run = RunDir(tmp_path / "run")
    worker = start_worker(toy_recipe_file(**sections), run.path)
    wait_for_step(run, 3, worker)
    worker.send_signal(signal.SIGTERM)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 75, errors
    state = run.read_state()
    assert state["state"] == "preempted" and run.steps() == [state["step"]] and state["step"] < 150
    changed = toy_recipe(**sections)
    train(changed, run.path)
    assert run.read_state()["state"] == "done"
    assert [r["step"] for r in records(run, "step")] == list(range(1, 151))


def test_a_diverging_run_stops_at_its_last_good_checkpoint(toy_recipe, tmp_path):
    config = toy_recipe(
        optim={"lr": 1e25, "max_grad_norm": None},
        train={"max_steps": 20, "epochs": 20},
        schedule={"name": "constant", "warmup": 0},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(TrainingDiverged, match="last good checkpoint is step"):
        train(config, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert run.read_state()["state"] == "failed" and "optim.lr" in run.read_state()["reason"]
    assert run.read_state()["step"] == len(losses(run)) > 1
    assert not run.model.exists()
    assert [r["event"] for r in records(run, "event")].count("skipped_step") == 3
    assert all(bool(t.isfinite().all()) for name, t in saved_tensors(run, run.steps()[0]).items() if "rng" not in name)


def test_early_stopping_ends_the_run_and_the_best_weights_are_the_result(toy_recipe, tmp_path):
    from safetensors.torch import load_file

    config = toy_recipe(
        adapter=LORA,
        optim={"lr": 0.5},
        schedule={"name": "constant", "warmup": 0},
        train={"max_steps": 60, "epochs": 60},
        eval={"every_steps": 1, "early_stopping": {"patience": 3}},
    )
    run = train(config, tmp_path / "run")
    evaluations = [r["loss"] for r in records(run, "eval")]
    best = evaluations.index(min(evaluations)) + 1
    assert len(evaluations) == best + 3 < 60
    assert run.best.read_text().strip() == run.step_dir(best).name
    result = load_file(run.adapter / "adapter_model.safetensors")
    kept = load_file(run.step_dir(best) / "adapter/adapter_model.safetensors")
    assert all(torch.equal(result[name], kept[name]) for name in kept)


def test_the_cut_into_micro_batches_does_not_change_the_run(toy_recipe, tmp_path):
    def run(micro_batch):
        train_section = {"global_batch": {"rows": 4}, "micro_batch": micro_batch, "max_steps": 5, "epochs": 20}
        return train(toy_recipe(adapter=LORA, train=train_section), tmp_path / str(micro_batch))

    one, two, four = (losses(run(size)) for size in (1, 3, 4))
    assert one == pytest.approx(two, rel=1e-5) and one == pytest.approx(four, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(toy_recipe, tmp_path, dtype):
    def run(dtype):
        sections = {"adapter": LORA, "quantization": NF4, "model": {"dtype": dtype}}
        return losses(train(toy_recipe(**sections, train={"max_steps": 8, "epochs": 9}), tmp_path / dtype))

    half, single = run(dtype), run("float32")
    assert half == pytest.approx(single, rel=0.05)


def test_attention_that_the_device_lacks_is_refused_before_data_are_read(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.model.flash4.is_installed", lambda: False)
    data = {"train": [{"path": str(tmp_path / "missing.jsonl"), "format": "messages"}]}
    config = toy_recipe(model={"attention": "flash4", "dtype": "bfloat16"}, data=data)
    with pytest.raises(UserError, match=r"model\.attention: flash4"):
        train(config, tmp_path / "run")


def test_a_resumed_run_refuses_another_recipe_and_names_what_changed(toy_recipe, tmp_path):
    run = train(toy_recipe(adapter=LORA), tmp_path / "run")
    before = run.recipe.read_text()
    with pytest.raises(UserError, match=r"optim.lr \(was 0.01, now 0.5\)"):
        train(toy_recipe(adapter=LORA, optim={"lr": 0.5}), run.path)
    assert run.recipe.read_text() == before
    train(toy_recipe(adapter=LORA, train={"log_every": 3}), run.path)


def test_a_resumed_run_refuses_other_data_under_the_same_name(toy_recipe, toy_rows_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(toy_rows_file.read_text())
    config = toy_recipe(adapter=LORA, data={"train": [{"path": str(rows), "format": "messages"}]})
    run = train(config, tmp_path / "run")
    rows.write_text("".join(toy_rows_file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="another training data"):
        train(config, run.path)


def test_two_trainers_never_share_a_run_dir(toy_recipe, tmp_path):
    from trainer.resume import only_one_trainer

    run = RunDir(tmp_path / "run")
    with only_one_trainer(run), pytest.raises(UserError, match=str(os.getpid())):
        train(toy_recipe(adapter=LORA), run.path)
    assert not run.metrics.exists()


def test_wrong_input_leaves_no_run_dir(toy_recipe, tmp_path):
    for wrong in (
        {"data": {"train": [{"path": str(tmp_path / "missing.jsonl"), "format": "messages"}]}},
        {"data": {"pack_length": 8, "long_rows": "drop"}},
        {"adapter": {**LORA, "targets": ["nothing_proj"]}},
        {"model": {"path": str(tmp_path / "no-model")}},
        {"data": {"split": {"validation": 0.0}}, "eval": {"every_steps": 1}},
    ):
        with pytest.raises(UserError):
            train(toy_recipe(**wrong), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_metrics_lines_are_json_with_every_promised_field(toy_recipe, tmp_path):
    run = train(toy_recipe(adapter=LORA), tmp_path / "run")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    promised = {"step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_second", "mfu"}
    promised |= {"gpu_memory_gib", "seconds"}
    assert all(promised <= line.keys() for line in lines if line["kind"] == "step")
