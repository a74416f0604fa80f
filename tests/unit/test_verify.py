"""A right merge is proven, and every planted fault is found with its evidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from tests.unit.export_toys import make_run
from tests.unit.test_merge import CASES, LORA, NF4
from tests.unit.test_run import train
from trainer.checkpoint.layout import find_damage, read_manifest, write_manifest
from trainer.config import RunConfig
from trainer.data.masking import build_labels
from trainer.data.prepare import load_split_examples
from trainer.errors import PacktrainError, UserError
from trainer.export.as_trained import AsTrained
from trainer.export.merge import merge_adapter
from trainer.export.verify import verify_export
from trainer.generate import load_for_inference

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_right_merge_is_proven(
    case: str, dtype: str, tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    config = toy_recipe(model={"path": str(toy_model_dir), "dtype": dtype}, **CASES[case])
    run = make_run(tmp_path / "run", config)
    merge_adapter(run, run / "merged")
    report = verify_export(run)  # finds merged/ in the run
    assert report.adapter_effect > 0.01
    assert report.logit_error < (1e-4 if dtype == "float32" else 0.05)
    assert report.rounded_otherwise < (1e-9 if dtype == "float32" else 0.01)
    assert "validation rows" in report.prompts


def test_original_base_tied_head_and_random_weights(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_tied_model_dir: Path
) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(toy_tied_model_dir / "config.json", shape)
    model = {"path": str(shape), "tokenizer": str(toy_tied_model_dir), "init": "random", "dtype": "bfloat16"}
    run = make_run(tmp_path / "run", toy_recipe(model=model, adapter=LORA, quantization=NF4))
    merge_adapter(run, run / "merged", "original")
    assert verify_export(run / "merged").merged_onto == "original"


def test_rows_that_the_template_refuses_are_no_prompts(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_rows_file: Path
) -> None:
    refused = {"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(refused) + "\n" + toy_rows_file.read_text())
    data = {"train": [{"path": str(rows), "format": "messages"}], "template": "alpaca", "split": {}, "pack_length": 128}
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA, data=data))
    merge_adapter(run, run / "merged")
    assert verify_export(run).prompts == "4 prompts of the train rows"


def test_run_that_moved_is_found(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA))
    merge_adapter(run, run / "merged")
    run.rename(tmp_path / "moved")
    verify_export(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "adapter")
    with pytest.raises(UserError, match="adapter is not at"):
        verify_export(tmp_path / "moved")


def test_adapter_too_small_for_the_dtype_is_no_silent_loss(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    config = toy_recipe(model={"path": str(toy_model_dir), "dtype": "bfloat16"}, adapter=LORA)
    run = make_run(tmp_path / "run", config, size=1e-4)
    merge_adapter(run, run / "merged")
    with pytest.raises(PacktrainError, match="bfloat16 is too coarse"):
        verify_export(run)


def test_an_int8_run_from_its_training_to_the_proof(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(toy_recipe(adapter=LORA, quantization={"type": "int8"}), tmp_path / "run")
    assert main(["merge", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert f"{run.merged} is the model that was trained" in said and "14 with an adapter" in said
    assert "onto the base's quantised weights it was trained on" in (run.merged / "README.md").read_text()
    assert main(["verify", str(run.path)]) == 0
    assert "onto the dequantized base" in capsys.readouterr().out

    shutil.rmtree(run.merged)
    merge_adapter(run.path, tmp_path / "original", "original")
    shutil.copytree(tmp_path / "original", run.merged)
    manifest = read_manifest(run.merged)
    quantization = {"type": "int8", "double_quant": False, "compute_dtype": "float32"}
    write_manifest(run.merged, manifest | {"quantization": quantization, "merged_onto": "dequantized"})
    assert main(["verify", str(run.path)]) == 1
    assert "differ from PEFT's float32 merge" in capsys.readouterr().err


def test_what_is_proven_wrong_while_merging_does_not_appear(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_recipe(model={"path": str(toy_model_dir), "dtype": "bfloat16"}, adapter=LORA)
    run = make_run(tmp_path / "run", config, size=1e-4)
    assert main(["merge", str(run)]) == 1
    assert "bfloat16 is too coarse" in capsys.readouterr().err
    assert not list(run.glob("merged*"))


class TestPlantedFaults:
    """Each tampers with a proven folder and rewrites its manifest, so that the hashes do not give it away."""

    @pytest.fixture(scope="class")
    def proven(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("proven")

    @pytest.fixture
    def run(self, proven: Path, tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path) -> Path:
        """A run of its own for each test, copied from one that is made once."""
        if not (proven / "run").exists():
            shutil.copytree(toy_model_dir, proven / "base")
            model = {"path": str(proven / "base"), "dtype": "bfloat16"}
            config = toy_recipe(model=model, adapter={**LORA, "targets": ["q_proj", "up_proj"]}, quantization=NF4)
            merge_adapter(make_run(proven / "run", config), proven / "run" / "merged")
        shutil.copytree(proven / "run", tmp_path / "run")
        return tmp_path / "run"

    def catch(self, run: Path, match: str) -> None:
        manifest = read_manifest(run / "merged")
        write_manifest(run / "merged", manifest)
        with pytest.raises(PacktrainError, match=match):
            verify_export(run)

    def change(self, run: Path, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
        file = run / "merged" / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = value(tensors[name].float()).to(tensors[name].dtype)
        save_file(tensors, file, metadata={"format": "pt"})

    def rewrite(self, file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def base_and_delta(self, run: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Of q_proj: the dequantised weight it was merged onto, and what the adapter adds."""
        adapter = load_file(run / "adapter" / "adapter_model.safetensors")
        key = f"base_model.model.{Q_PROJ.removesuffix('.weight')}"
        delta = 4.0 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
        return load_file(run / "merged" / "model.safetensors")[Q_PROJ].float() - delta, delta

    def test_nothing_planted(self, run: Path) -> None:
        write_manifest(run / "merged", read_manifest(run / "merged"))
        verify_export(run)

    def test_one_merge_skipped(self, run: Path, proven: Path) -> None:
        with torch.no_grad():
            untouched = AsTrained(run / "merged").read(f"base_model.model.{Q_PROJ}")
        self.change(run, Q_PROJ, lambda _: untouched)
        self.catch(run, "q_proj.weight is the base's, although its adapter is not zero")

    @pytest.mark.parametrize("factor", [0.25, 0.9, 2.0])
    def test_wrong_scale(self, run: Path, factor: float) -> None:
        base, delta = self.base_and_delta(run)
        self.change(run, Q_PROJ, lambda _: base + factor * delta)
        self.catch(run, "q_proj.weight: .* elements differ from PEFT's float32 merge")

    def test_merged_onto_the_wrong_base(self, run: Path, tmp_path: Path) -> None:
        merge_adapter(run, tmp_path / "original", "original")
        shutil.copy(tmp_path / "original" / "model.safetensors", run / "merged")
        self.catch(run, "differ")

    def test_manifest_of_something_else(self, run: Path) -> None:
        manifest = read_manifest(run / "merged")
        kept = {name: value for name, value in manifest.items() if name not in ("model", "seed")}
        write_manifest(run / "merged", kept)
        self.catch(run, r"manifest\.json: model, seed missing")

    def test_truncated_instead_of_rounded(self, run: Path) -> None:
        base, delta = self.base_and_delta(run)

        def towards_zero(_: torch.Tensor) -> torch.Tensor:
            bits = (base + delta * (1 - 2**-9)).contiguous().view(torch.int32)
            return bits.bitwise_and(-(2**16)).view(torch.float32)

        self.change(run, Q_PROJ, towards_zero)
        self.catch(run, "one step beside the rounding|differ from PEFT")

    def test_tensor_without_adapter_changed(self, run: Path) -> None:
        self.change(run, "model.layers.1.self_attn.k_proj.weight", lambda w: w.index_fill(0, torch.tensor([3]), 0.5))
        self.catch(run, "k_proj.weight has no adapter, and differs")

    def test_logits_name_the_layer(self, run: Path) -> None:
        self.change(run, "model.layers.1.mlp.up_proj.weight", lambda w: w * 1.5)
        self.catch(run, r"Error after each layer: 0: 0\.\d+.*, 1: [0-9.]+")

    def test_tensor_missing(self, run: Path) -> None:
        file = run / "merged" / "model.safetensors"
        tensors = load_file(file)
        del tensors[Q_PROJ]
        save_file(tensors, file, metadata={"format": "pt"})
        self.catch(run, "q_proj.weight is missing")

    def test_template_changed(self, run: Path) -> None:
        file = run / "merged" / "chat_template.jinja"
        file.write_text(file.read_text().replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))
        self.catch(run, "chat_template")

    def test_stop_token_lost(self, run: Path) -> None:
        self.rewrite(run / "merged" / "generation_config.json", eos_token_id=5)
        self.catch(run, "without the trained stop token")

    def test_stop_token_that_is_none(self, run: Path) -> None:
        self.rewrite(run / "merged" / "generation_config.json", eos_token_id=[2, 65])
        self.catch(run, "neither training nor base end answers at 65")

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("tokenizer.json", "tokenizer: cannot be loaded, a file of it is missing"),
            ("tokenizer_config.json", "tokenizer: bos_token is None"),
            ("chat_template.jinja", "tokenizer: chat_template is None"),
            ("generation_config.json", "without the trained stop token"),
            ("config.json", "config.json is missing"),
        ],
    )
    def test_file_missing(self, run: Path, name: str, match: str) -> None:
        (run / "merged" / name).unlink()
        with pytest.raises(PacktrainError, match=f"{name}.*missing"):
            verify_export(run)
        self.catch(run, match)

    def test_tokenizer_of_another_model(self, run: Path) -> None:
        file = run / "merged" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["merges"] = []
        file.write_text(json.dumps(tokenizer))
        self.catch(run, "tokenizer")

    def test_flipped_byte(self, run: Path) -> None:
        file = run / "merged" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(PacktrainError, match=r"model\.safetensors does not have the hash"):
            verify_export(run)

    def test_another_adapter(self, run: Path) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
        with pytest.raises(PacktrainError, match="is not the file that was merged"):
            verify_export(run)

    def test_another_base(self, run: Path, proven: Path) -> None:
        file = proven / "base" / "model.safetensors"
        whole = file.read_bytes()
        try:
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(PacktrainError, match=r"content hash .* merged with"):
                verify_export(run)
        finally:
            file.write_bytes(whole)

    def test_nothing_merged(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no model that packtrain merged"):
            verify_export(tmp_path)


def test_merged_folder_beside_the_users_own_recipe(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    """`recipe.yaml` there does not make its folder a run."""
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA))
    merge_adapter(run, tmp_path / "out")
    shutil.copy(run / "recipe.yaml", tmp_path)
    verify_export(tmp_path / "out")


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_what_merging_did_to_the_validation_loss_is_written_down(
    onto: Any, tmp_path: Path, toy_recipe: Callable[..., RunConfig]
) -> None:
    config = toy_recipe(adapter={"r": 4, "alpha": 16.0}, quantization={"type": "nf4", "double_quant": True})
    run = make_run(tmp_path / "run", config)
    merge_adapter(run, run / "merged", onto)
    found = verify_export(run).validation
    assert found is not None and found.rows == 8

    losses = {}
    for name, folder in {"as_trained": run, "merged": run / "merged"}.items():
        loaded = load_for_inference(folder, torch.device("cpu"))
        examples = load_split_examples(config, "validation", loaded.tokenizer)[:8]
        total, tokens = 0.0, 0
        for row in build_labels(examples, loaded.template, loaded.tokenizer, config.data):
            trained = sum(label != -100 for label in row.labels[1:])
            with torch.no_grad():
                loss = loaded.model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss.item()
            total, tokens = total + trained * loss, tokens + trained
        losses[name] = total / tokens
        assert tokens == found.tokens
    assert found.merged == pytest.approx(losses["merged"], abs=1e-5)
    assert found.as_trained == pytest.approx(losses["as_trained"], abs=1e-5)
    assert (abs(found.merged - found.as_trained) > 5e-5) == (onto == "original")
    assert read_manifest(run / "merged")["validation_loss"] == asdict(found)
    assert f"- Validation loss: {found.merged:.4f} merged" in (run / "merged" / "README.md").read_text()
    assert find_damage(run / "merged") is None
    assert verify_export(run).validation == found
    card = (run / "merged" / "README.md").read_text()
    assert card.count("- Validation loss") == 1 and "## Merge\n\n- Validation loss" in card and "Contact:" in card
