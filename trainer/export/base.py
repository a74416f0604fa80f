"""The base's tensors by name, with the shards they lie in: what merging and verifying read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.base_location import how_to_name, locate_base
from trainer.checkpoint.result import Result
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.export.shards import cut_into_shards
from trainer.model.folder import base_folder
from trainer.model.lora import decoder_linears
from trainer.model.source import open_weights
from trainer.model.weights import (
    STALE_SUFFIX,
    base_content_hash,
    build_on_meta,
    computing_config,
    load_base_config,
    random_parameter,
    weight_files,
)

GENERATION_CONFIG = "generation_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class BaseTensors:
    """Random access to a base, on disk or made from a seed; nothing is kept in memory.

    Attributes:
        model: which base.
        seed: of ``init: random``.
    """

    model: ModelConfig
    seed: int = 0

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        return load_base_config(self.model)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, in the order of the shards."""
        if self.model.init == "random":
            return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        return {
            name: tuple(self._handles[file].get_slice(name).get_shape())
            for file, names in self.shards.items()
            for name in names
        }

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """File name -> its tensors. A random base is cut into shards of some 4 GiB."""
        if self.model.init != "random":
            return {
                name: [key for key in handle.offset_keys() if not key.endswith(STALE_SUFFIX)]
                for name, handle in self._handles.items()
            }
        return cut_into_shards(self._parameters, getattr(torch, self.model.dtype))

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor -> the file it lies in."""
        return {name: file for file, names in self.shards.items() for name in names}

    @cached_property
    def linears(self) -> set[str]:
        """Names of the decoder layers' linear modules: those that quantisation is for."""
        return set(decoder_linears(self._meta))

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor as it is stored; on the CPU possibly a view of the mapped file."""
        if self.model.init == "random":
            shape = torch.Size(self.shapes[name])
            return random_parameter(self.config, name, shape, self.seed, self.saved_dtype(name), device)
        return self._handles[self.file_of[name]].get_tensor(name).to(device)

    def saved_dtype(self, name: str) -> torch.dtype:
        """Dtype the tensor is stored in; a random base is made in ``model.dtype``."""
        if self.model.init == "random":
            return getattr(torch, self.model.dtype)
        slice_dtype = self._handles[self.file_of[name]].get_slice(name).get_dtype()
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(slice_dtype, torch.float32)

    def saved_bytes(self, name: str) -> int:
        """Size of the tensor as it is stored."""
        return prod(self.shapes[name]) * self.saved_dtype(name).itemsize

    def content_hash(self, check: Callable[[], None] = lambda: None) -> str:
        """blake3 of the base, as training recorded it; `check` is called before each file."""
        return base_content_hash(self.model, self.seed, check)

    @cached_property
    def folder(self) -> Path | None:
        """Where the base's files lie; None where a shape is all there is."""
        return base_folder(self.model)

    @cached_property
    def _meta(self) -> Any:
        return build_on_meta(self.config, torch.float32, "eager")

    @property
    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(self._meta.named_parameters())

    @cached_property
    def _handles(self) -> dict[str, Any]:
        assert self.folder is not None
        return {file.name: open_weights(file) for file in weight_files(self.folder)}


def base_of_result(result: Result) -> BaseTensors:
    """The base an adapter belongs to, where it lies now.

    Raises:
        UserError: see `locate_base`.
    """
    return BaseTensors(locate_base(result), result.config.train.seed if result.config else 0)


def settings_of_result(result: Result, base: BaseTensors) -> Path | None:
    """The folder whose generation settings an adapter's merge takes over: its own, where the training kept them."""
    return result.folder if (result.folder / GENERATION_CONFIG).exists() else base.folder


def check_unchanged(base: BaseTensors, found: str, result: Result) -> None:
    """Compares the base's content hash `found` with the one that training recorded.

    Raises:
        UserError: it is another one now.
    """
    trained_on = (result.base or {}).get("content_hash")
    if trained_on and trained_on != found:
        raise UserError(
            base.model.path,
            f"the base has content hash {found}, and the adapter was trained on {trained_on}",
            "the very files that were trained on",
            f"put them back, or {how_to_name(result)}",
        )


def check_config(model: ModelConfig, result: Result) -> None:
    """Compares what the base's ``config.json`` has the weights compute with what it was in training, if that is known.

    Raises:
        UserError: a field is another one now.
    """
    trained = (result.base or {}).get("config")
    now = computing_config(model) if trained else None
    if trained and now is not None and now != trained:
        name = next(name for name in sorted(trained.keys() | now.keys()) if trained.get(name) != now.get(name))
        raise UserError(
            f"{model.path}, config.json",
            f"{name} is {now.get(name)!r}, and was {trained.get(name)!r} in training",
            "the very file that was trained with",
            f"put it back, or {how_to_name(result)}",
        )
