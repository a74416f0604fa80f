"""The fused adapter layer computes what PEFT's does, and its files are PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.model.adapter_files import adapter_names, load_adapter, save_adapter
from trainer.model.load import load_model
from trainer.model.lora import FusedLora, LoraMatMul
from trainer.model.quantized import QuantizedLinear

CPU = torch.device("cpu")
QUANTIZATION = {"type": "nf4", "double_quant": True}
IDS = torch.arange(5, 25)[None]
ALL_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

Recipe = Callable[..., RunConfig]


def build(recipe: Recipe, quantized: bool = False, model: Any = None, **adapter: Any) -> Any:
    quantization = QUANTIZATION if quantized else None
    config = recipe(model=model or {}, adapter={"r": 4, **adapter}, quantization=quantization)
    peft_model = load_model(config, CPU).model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return peft_model


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def by_modules(model: Any) -> Any:
    """Has the decoder layers call their linears one by one: a hook has to run where its module is called."""
    for layer in model.get_base_model().model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *call: None)
    return model


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each fused matmul."""
    calls: list[int] = []
    apply = LoraMatMul.apply
    monkeypatch.setattr(LoraMatMul, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    return calls


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_fused_forward_equals_pefts(toy_recipe: Recipe, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_modules(build(toy_recipe, quantized))
    fused = logits(model)
    monkeypatch.setattr(FusedLora, "forward", PeftLoraLinear.forward)
    torch.testing.assert_close(fused, logits(model), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_dora_magnitudes_are_pefts(toy_recipe: Recipe, quantized: bool) -> None:
    """Which PEFT computes when it attaches an adapter to a base that has its weights."""
    model = build(toy_recipe, quantized, model={"dtype": "bfloat16"}, dora=True)
    for layer in (module for module in model.modules() if isinstance(module, FusedLora)):
        base: Any = layer.get_base_layer()
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
        plain.weight.data.copy_(base.weight)
        theirs = PeftLoraLinear(plain, "default", config=peft.LoraConfig(use_dora=True), r=4, lora_alpha=8)
        magnitudes: Any = theirs.lora_magnitude_vector["default"]
        assert torch.equal(layer.lora_magnitude_vector["default"].weight, magnitudes.weight.float())


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_which_layers_are_fused(toy_recipe: Recipe, quantized: bool, fused_calls: list[int]) -> None:
    model = by_modules(build(toy_recipe, quantized))
    logits(model)
    assert len(fused_calls) == 14  # 2 layers of 7 linears

    with model.disable_adapter():
        base = logits(model)
    assert len(fused_calls) == 14
    assert not torch.allclose(base, logits(model), atol=1e-3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(logits(model), base)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_dropout_and_dora_take_pefts_path(toy_recipe: Recipe, quantized: bool, fused_calls: list[int]) -> None:
    model = by_modules(build(toy_recipe, quantized, dropout=0.5)).train()
    assert not torch.equal(logits(model), logits(model))
    assert not fused_calls
    model.eval()
    assert torch.equal(logits(model), logits(model))
    assert len(fused_calls) == 28  # without dropout at work the layers are plain again
    logits(build(toy_recipe, quantized, dora=True))
    assert len(fused_calls) == 28


def test_an_adapter_added_later_may_be_drawn_in_another_way(toy_recipe: Recipe) -> None:
    model = build(toy_recipe, quantized=True)
    before = logits(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(logits(model), before)


def test_two_adapters_take_pefts_path(toy_recipe: Recipe, fused_calls: list[int]) -> None:
    model = build(toy_recipe, quantized=True)
    one = logits(model)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    fused_calls.clear()
    both = logits(model)  # the second one's B is zero
    assert not fused_calls
    torch.testing.assert_close(both, one, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_backward_keeps_less_than_pefts(toy_recipe: Recipe, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_modules(build(toy_recipe, quantized, model={"dtype": "bfloat16"}))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept_bytes() -> int:
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, keep), torch.autocast("cpu", dtype=torch.bfloat16):
            logits(model)
        storages = [t.untyped_storage() for t in kept]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
        return sum(sizes.values())

    fused = kept_bytes()
    monkeypatch.setattr(FusedLora, "forward", PeftLoraLinear.forward)
    assert fused < 0.9 * kept_bytes()  # of few tokens: a tenth of it are the adapter's matrices


def test_first_layer_asks_for_no_input_gradient(toy_recipe: Recipe) -> None:
    layer = next(module for module in build(toy_recipe).modules() if isinstance(module, FusedLora))
    x = torch.randn(3, layer.in_features)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A["default"].weight.grad is not None


def test_peft_still_offers_custom_modules() -> None:
    """The one private name we stand on."""
    config = peft.LoraConfig()
    config._register_custom_module({QuantizedLinear: FusedLora})
    assert config._custom_modules == {QuantizedLinear: FusedLora}
    assert "_custom_modules" not in config.to_dict()


def test_adapter_weights_follow_the_seed(toy_recipe: Recipe) -> None:
    def first(seed: int) -> torch.Tensor:
        model = load_model(toy_recipe(adapter={"r": 4}, train={"seed": seed}), CPU).model
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    state = torch.random.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"dora": True}], ids=str)
def test_files_are_pefts(toy_recipe: Recipe, quantized: bool, extra: dict[str, Any], tmp_path: Path) -> None:
    model = build(toy_recipe, quantized, **extra)
    config = model.peft_config["default"]
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    plain = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4, target_modules=ALL_LINEAR, task_type="CAUSAL_LM", use_dora=config.use_dora, **_saved(extra)
        ),
    )
    plain.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)

    save_adapter(model, tmp_path / "ours")

    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == config.base_model_name_or_path
    assert written["inference_mode"] is True
    assert sorted(written["target_modules"]) == ALL_LINEAR
    assert set(written) == set(json.loads((tmp_path / "theirs/adapter_config.json").read_text()))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def _saved(extra: dict[str, Any]) -> dict[str, Any]:
    return {"modules_to_save": extra["modules_to_save"]} if "modules_to_save" in extra else {}


def test_saving_does_not_end_training(toy_recipe: Recipe, tmp_path: Path) -> None:
    model = build(toy_recipe)
    save_adapter(model, tmp_path)
    assert model.peft_config["default"].inference_mode is False
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"dora": True}], ids=str)
def test_saved_and_loaded_again(toy_recipe: Recipe, quantized: bool, extra: dict[str, Any], tmp_path: Path) -> None:
    model = build(toy_recipe, quantized, **extra)
    if "modules_to_save" in extra:
        model.get_base_model().lm_head.modules_to_save["default"].weight.data += 1
    save_adapter(model, tmp_path)
    config = toy_recipe(adapter={"r": 4, **extra}, quantization=QUANTIZATION if quantized else None, train={"seed": 5})
    fresh = load_model(config, CPU).model
    assert not torch.allclose(logits(fresh), logits(model), atol=1e-3)

    load_adapter(fresh, tmp_path, config.adapter)

    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "adapter", [{"r": 4}, {"r": 4, "dora": True}, {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}], ids=str
)
def test_an_adapter_is_written_without_a_look_at_the_model(
    toy_recipe: Recipe, adapter: dict[str, Any], tmp_path: Path
) -> None:
    """Which may be computing: FSDP2 would cut what it has gathered as soon as a module is asked for its state."""
    model = load_model(toy_recipe(adapter=adapter), CPU).model
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    trained, names = dict(model.named_parameters()), adapter_names(model)

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was asked for its state")

    for module in model.modules():
        module.register_state_dict_pre_hook(refuse)
    save_adapter(model, tmp_path, {key: trained[name] for key, name in names.items()})
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_loads_an_adapter_made_by_peft(toy_recipe: Recipe, tmp_path: Path) -> None:
    config = toy_recipe(adapter={"r": 4, "alpha": 8})
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    plain = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    plain.save_pretrained(tmp_path)
    model = load_model(config, CPU).model

    load_adapter(model, tmp_path, config.adapter)

    torch.testing.assert_close(logits(model), logits(plain), atol=2e-6, rtol=1e-5)


def _change_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")


def _cut_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name][:2].clone()}, folder / "adapter_model.safetensors")


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank": (lambda folder: _change_config(folder, r=8), "r 8"),
    "alpha": (lambda folder: _change_config(folder, lora_alpha=5), "lora_alpha 5"),
    "dora": (lambda folder: _change_config(folder, use_dora=True), "use_dora True"),
    "pissa": (lambda folder: _change_config(folder, init_lora_weights="pissa"), "pissa"),
    "olora": (lambda folder: _change_config(folder, init_lora_weights="olora"), "olora"),
    "no lora": (lambda folder: _change_config(folder, peft_type="IA3"), "IA3"),
    "tensor missing": (_drop_tensor, "only in the recipe"),
    "tensor of another shape": (_cut_tensor, "of shape"),
    "truncated": (_truncate, "truncated"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no such file"),
    "config no json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_an_adapter_that_does_not_fit(toy_recipe: Recipe, damage: str, tmp_path: Path) -> None:
    model = build(toy_recipe)
    save_adapter(model, tmp_path)
    before = logits(model)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)

    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path, toy_recipe(adapter={"r": 4}).adapter)

    assert torch.equal(logits(model), before)


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "wrapped"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["mlp.up_proj"], 2),
        (["model.layers.1.self_attn.o_proj"], 1),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_targets(toy_recipe: Recipe, quantized: bool, targets: Any, wrapped: int) -> None:
    model = build(toy_recipe, quantized, targets=targets)
    assert sum(isinstance(module, FusedLora) for module in model.modules()) == wrapped


@pytest.mark.parametrize("targets", [["q_proj", "query"], ["lm_head"], ["embed_tokens"], ["proj"], []])
def test_targets_that_do_not_exist(toy_recipe: Recipe, targets: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build(toy_recipe, targets=targets)
    assert error.value.where == "adapter.targets"
    assert "q_proj, up_proj" in error.value.allowed
    assert "q_proj" not in error.value.found


def test_modules_to_save_that_do_not_exist(toy_recipe: Recipe) -> None:
    with pytest.raises(UserError, match="embed_tokens, lm_head"):
        build(toy_recipe, modules_to_save=["head"])


def test_modules_to_save_of_tied_embeddings_are_refused(toy_recipe: Recipe, toy_tied_model_dir: Path) -> None:
    config = toy_recipe(model={"path": str(toy_tied_model_dir)}, adapter={"modules_to_save": ["lm_head"]})
    with pytest.raises(UserError, match="tied"):
        load_model(config, CPU)


def test_merging_into_4_bit_is_refused_and_into_16_bit_is_pefts(toy_recipe: Recipe) -> None:
    with pytest.raises(PacktrainError, match="packtrain merge"):
        build(toy_recipe, quantized=True).merge_adapter()
    with pytest.raises(PacktrainError, match="packtrain merge"):
        build(toy_recipe, quantized=True, dora=True).merge_adapter()
    model = build(toy_recipe)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
