"""Our norm and MLP against transformers' own: the same parameters, the same numbers, the same gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from trainer.model.layers import FusedMLP, FusedRMSNorm, fuse_layers

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}


def models(kind, **settings):
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    torch.manual_seed(0)
    plain = model_class(config_class(**SIZES, **settings)).float()
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    fused = model_class(config_class(**SIZES, **settings)).float()
    fuse_layers(fused)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_logits_and_gradients_are_those_of_transformers(kind):
    plain, fused = models(kind)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert sum(isinstance(module, (FusedMLP, FusedRMSNorm)) for module in fused.modules()) == 7
    ids = torch.randint(0, 61, (2, 11))
    logits = [model(ids).logits for model in (plain, fused)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    for model, found in zip((plain, fused), logits, strict=True):
        found.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_with_another_activation_keeps_its_mlp():
    plain, fused = models("llama", hidden_act="gelu")
    assert not any(isinstance(module, FusedMLP) for module in fused.modules())
    ids = torch.randint(0, 61, (1, 5))
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits)


def test_a_norm_rounds_once_where_transformers_rounds_twice():
    _, fused = models("llama")
    norm = fused.model.norm.to(torch.bfloat16)
    x = torch.randn(7, 48, dtype=torch.bfloat16)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
