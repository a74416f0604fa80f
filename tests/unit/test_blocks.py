"""Decoder layers of three nodes against transformers' own and PEFT's adapters, at every level of recompute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trainer.config import RunConfig
from trainer.model.kernels.rope import rotate
from trainer.model.layers import FusedDecoderLayer
from trainer.model.load import load_model
from trainer.model.lora import FusedLora

CPU = torch.device("cpu")
LEVELS = ["none", "norms", "mlp"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 4}},
    "lora-some": {"adapter": {"r": 4, "targets": ["q_proj", "v_proj", "down_proj"], "rslora": True}},
    "qlora": {"adapter": {"r": 4}, "quantization": {"type": "nf4", "double_quant": True}},
    "int8": {"adapter": {"r": 4}, "quantization": {"type": "int8"}},
}
Recipe = Callable[..., RunConfig]


def build(recipe: Recipe, method: str) -> Any:
    """A model of the toy's shape whose norms and adapters are not at their first values."""
    model = load_model(recipe(**METHODS[method]), CPU).model.train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "norm" in name:
                parameter.normal_(0.3 if "norm" in name else 0.0, 0.1, generator=generator)
    return model


def causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def set_level(model: Any, level: str) -> None:
    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    assert len(layers) == 2
    for layer in layers:
        layer.recompute = level  # type: ignore[assignment]


def packed() -> dict[str, torch.Tensor | int]:
    """Three documents in one row."""
    lengths = torch.tensor([5, 9, 3])
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.randint(5, 60, (1, 17), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": cu, "max_length_q": 9}


def output_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    rows = packed()
    ids: Any = rows.pop("input_ids")
    embeddings = causal_lm(model).get_input_embeddings()(ids)
    hidden = causal_lm(model).model(inputs_embeds=embeddings, use_cache=False, **rows)[0]
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (hidden * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain(model: Any) -> Any:
    """The same model in the modules of transformers and PEFT alone."""
    lm = causal_lm(model)
    for index, layer in enumerate(lm.model.layers):
        own = LlamaDecoderLayer(lm.config, index)
        own.self_attn, own.mlp = layer.self_attn, layer.mlp
        own.input_layernorm, own.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        lm.model.layers[index] = own
    return model


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_transformers_and_peft(
    toy_recipe: Recipe, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(toy_recipe, method)
    found = {}
    for level in LEVELS:
        set_level(model, level)
        found[level] = output_and_gradients(model)
    monkeypatch.setattr(FusedLora, "forward", PeftLoraLinear.forward)
    wanted, gradients = output_and_gradients(plain(model))
    for hidden, own in found.values():
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (own[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: {error}"


def kept_elements(model: Any) -> dict[int, int]:
    """What a layer's forward keeps for backward, parameters aside: elements by where they lie."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    rows, lm = packed(), causal_lm(model)
    embeddings = lm.get_input_embeddings()(rows.pop("input_ids")).detach().requires_grad_()
    angles = lm.model.rotary_emb(embeddings, position_ids=rows["position_ids"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = lm.model.layers[1](embeddings, attention_mask=None, position_embeddings=angles, **rows)
    kept[0] = output.numel() // embeddings.shape[-1]  # also keeps the graph alive until here
    return kept


def test_each_level_keeps_less(toy_recipe: Recipe) -> None:
    model = build(toy_recipe, "qlora")
    config, per_token = causal_lm(model).config, {}
    for level in LEVELS:
        set_level(model, level)
        kept = kept_elements(model)
        per_token[level] = sum(kept.values()) / kept[0]
    assert per_token["none"] - per_token["norms"] == 2 * config.hidden_size + config.intermediate_size
    assert per_token["norms"] - per_token["mlp"] == 2 * config.intermediate_size


def test_padded_rows_and_dropout_are_computed_by_the_modules(toy_recipe: Recipe) -> None:
    model = build(toy_recipe, "qlora").eval()
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    both = model(input_ids=ids, use_cache=False).logits
    for row, logits in zip(ids, both, strict=True):
        torch.testing.assert_close(model(input_ids=row[None], use_cache=False).logits[0], logits, rtol=1e-5, atol=1e-5)
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, FusedLora) and module.in_features == module.out_features:
            module.register_forward_hook(lambda *call: calls.append(1))
    model(input_ids=ids[:1], use_cache=False)
    assert calls, "a module with a hook has to be called"


def test_rotation_back_undoes_it_and_is_its_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, dtype=torch.float64)
    angles = torch.rand(6, 4, dtype=torch.float64)
    cos, sin = (torch.cat([table, table], dim=1) for table in (angles.cos(), angles.sin()))
    first, second = (x[..., :4], x[..., 4:])
    c, s = cos[:, None, :4], sin[:, None, :4]
    wanted = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    rotated = rotate(x, cos, sin)
    torch.testing.assert_close(rotated, wanted)
    torch.testing.assert_close(rotate(rotated, cos, sin, inverse=True), x)


def test_a_frozen_input_costs_no_gradient(toy_recipe: Recipe) -> None:
    """The embeddings of an adapter's run: nothing below the first layer is trained."""
    model = build(toy_recipe, "lora")
    products: list[tuple[int, ...]] = []
    rows = packed()
    embeddings = causal_lm(model).get_input_embeddings()(rows.pop("input_ids")).detach()
    hidden = causal_lm(model).model(inputs_embeds=embeddings, use_cache=False, **rows)[0]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as frozen:
        hidden.sum().backward()
    rows = packed()
    embeddings = causal_lm(model).get_input_embeddings()(rows.pop("input_ids")).detach().requires_grad_()
    hidden = causal_lm(model).model(inputs_embeds=embeddings, use_cache=False, **rows)[0]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as whole:
        hidden.sum().backward()
    assert embeddings.grad is not None and not products
    assert frozen.get_total_flops() < whole.get_total_flops()
