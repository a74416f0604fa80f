"""The dial ``train.recompute``: what a recipe may say, and what the model's layers are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.load import load_model
from trainer.model.recompute import decoder_layers, has_fused_layers, set_recompute
from trainer.planning.levels import LayerLevels, read_levels
from trainer.recipe import RecipeError, dump_recipe, load_recipe


def test_levels_in_order_from_the_bottom(toy_recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = toy_recipe_file(train={"recompute": {"full": 1, "none": 2}})
    config = load_recipe(recipe, {"train.recompute": "{norms: 2, full: 1}"})
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(config))
    levels = [read_levels(c.train.recompute, 3) for c in (load_recipe(recipe), config, load_recipe(copy))]  # type: ignore
    assert [found.of_layers for found in levels] == [("full", "none", "none"), *[("norms", "norms", "full")] * 2]
    assert all(LayerLevels.build(found.counts) == found for found in levels)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{full: 1, nonne: 1}", "a mapping of none, norms, mlp, full to a whole number above 0"),
        ("{full: 0}", "train.recompute.full"),
        ("{full: many}", "train.recompute.full"),
        ("{}", "one of auto, none, norms, mlp, full"),
        ("fulll", "one of auto, none, norms, mlp, full"),
    ],
)
def test_what_is_no_level(text: str, said: str, toy_recipe_file: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(toy_recipe_file(), {"train.recompute": text})
    assert said in str(caught.value)


def test_levels_have_to_add_up() -> None:
    with pytest.raises(UserError, match="adds up to 3 layers") as caught:
        read_levels({"full": 1, "none": 2}, 2)
    assert "the model's 2 layers" in str(caught.value)


def checkpointed(model: nn.Module) -> list[bool]:
    return [layer.gradient_checkpointing for layer in decoder_layers(model)]


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}}], ids=["full", "lora"])
def test_each_layer_is_told_its_own_level(sections: dict[str, Any], toy_recipe: Callable[..., RunConfig]) -> None:
    model = build_model(toy_recipe(**sections), torch.device("cpu")).model
    for levels, wanted in [({"full": 1, "none": 1}, [True, False]), ({"none": 1, "full": 1}, [False, True])]:
        set_recompute(model, LayerLevels.build(levels))  # type: ignore[arg-type]
        assert checkpointed(model) == wanted
    set_recompute(model, read_levels("mlp", 2))
    assert checkpointed(model) == [False, False]


def test_layers_with_a_dial_of_their_own_are_told(toy_recipe: Callable[..., RunConfig]) -> None:
    model = build_model(toy_recipe(), torch.device("cpu")).model
    assert all(hasattr(layer, "recompute") for layer in decoder_layers(model)) == has_fused_layers(model)
    for layer in decoder_layers(model):
        layer.recompute = "none"
    assert has_fused_layers(model)
    set_recompute(model, LayerLevels(("mlp", "norms")))
    assert [layer.recompute for layer in decoder_layers(model)] == ["mlp", "norms"]
    assert checkpointed(model) == [False, False]


def test_half_of_the_layers_keep_their_activations(toy_recipe: Callable[..., RunConfig]) -> None:
    model = load_model(toy_recipe(), torch.device("cpu")).model.train()
    ids = torch.arange(5, 69)[None]

    def kept(recompute: Any) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        set_recompute(model, read_levels(recompute, 2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
        return sum(sizes.values())

    none, half, full = (kept(recompute) for recompute in ("none", {"full": 1, "none": 1}, "full"))
    assert half == pytest.approx((none + full) / 2, rel=0.01)
    assert full < half < none
