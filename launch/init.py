"""`packtrain init`: a recipe to start from. Its comments are the descriptions of the config's own fields."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from trainer.config import ModelConfig, RowFormat, RunConfig
from trainer.config_rules import is_address
from trainer.data.formats import FORMATS
from trainer.errors import UserError
from trainer.recipe_schema import Loc, alternatives, describe, schema_at, takes_null
from trainer.recipe_yaml import dump_inline

if TYPE_CHECKING:
    from trainer.planning.shape import ModelShape

GIB = 2**30
SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z])")  # in a model's name: Llama-2-7b-hf


def init(
    *,
    model: str,
    data: str,
    format: RowFormat = "messages",
    columns: dict[str, str] | None = None,
    method: Literal["full", "lora", "qlora"] = "qlora",
    gpu_memory: Annotated[float | None, Parameter(validator=Number(gt=0))] = None,
    out: Path = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe. Every field is in it, those left at their default as comments.

    Args:
        model: folder or hub id of a Llama-family model.
        data: file or hub id of the training rows.
        format: how the rows are read.
        columns: the format's field and the data set's column, where they differ: --columns.output response.
        method: full trains every weight, lora an adapter on a 16-bit base, qlora one on a quantised base.
        gpu_memory: GiB of the GPU it will run on.
        out: where to write; an existing file is not touched.
    """
    if unknown := sorted(set(columns or {}) - set(FORMATS[format].fields)):
        raise UserError(f"--columns.{unknown[0]}", f"is no field of {format}", ", ".join(FORMATS[format].fields))
    for option, path in (("--model", model), ("--data", data)):
        if is_address(path):
            fix = "download it and name what is here"
            raise UserError(option, f"{path} is an address", "a path on this host, or a hub id", fix)
    chosen = choose_fields(model, data, format, columns or {}, method, gpu_memory)
    hardware = f"one GPU of {gpu_memory:g} GiB" if gpu_memory else "one GPU"
    header = f"""\
# {_one_line(model)} on {_one_line(data)}: {method}, {hardware}
#
#   packtrain preprocess {out} --show 3    what is trained on
#   packtrain train {out}                  trains, and resumes when called again
#
# A line that begins with "# name:" shows a default. Take its "# " away to change it.
"""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(header + "\n".join(comment_fields(chosen)) + "\n")
    except FileExistsError as error:
        raise UserError(
            "--out", f"{out} exists", "a file that does not exist yet", "remove it or name another"
        ) from error
    print(f"wrote {out}")
    for note in _missing(model, data):
        print(note, file=sys.stderr)


def _missing(model: str, data: str) -> Iterator[str]:
    """What a training here would not find, or would look for on the hub; the recipe may be for another host."""
    from trainer.data.sources import looks_local

    for option, path, kind in (("--model", model, "folder"), ("--data", data, "file or folder")):
        if glob.glob(str(Path(path).expanduser())):
            continue
        if looks_local(path) or glob.has_magic(path):
            yield f"{option}: no {kind} {path} is here (relative paths are from the folder packtrain is called in)"
        else:
            yield f"{option}: {path} is taken for an id on the hub, as no such {kind} is here"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def choose_fields(
    model: str, data: str, format: str, columns: dict[str, str], method: str, gpu_memory: float | None
) -> dict[str, Any]:
    """The fields that differ from their defaults, for a method and a GPU.

    Raises:
        UserError: the GPU cannot hold the model by this method.
    """
    fields = _fields(model, data, format, columns, method, gpu_memory)
    if gpu_memory and not _fits(fields, gpu_memory):
        if method == "full":
            fields["optim"]["name"] = "paged_adamw_8bit"
            fields["train"]["param_dtype"] = "bfloat16"
        if not _fits(fields, gpu_memory):
            others = {other: _fields(model, data, format, columns, other, gpu_memory) for other in ("lora", "qlora")}
            raise _too_small(fields, method, gpu_memory, [m for m, f in others.items() if _fits(f, gpu_memory)])
    return fields


def _fields(
    model: str, data: str, format: str, columns: dict[str, str], method: str, gpu_memory: float | None
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": {"path": model},
        "data": {
            "train": [{"path": data, "format": format} | ({"columns": columns} if columns else {})],
            "template": "alpaca" if format == "alpaca" else "tokenizer",
            "train_on": "all" if format == "text" else "assistant",
            "split": {"validation": 0.02},
            "pack_length": min(2048 if gpu_memory and gpu_memory < 24 else 4096, _num_positions(model)),
        },
        "optim": {"name": "adamw", "lr": 2.0e-5 if method == "full" else 2.0e-4, "max_grad_norm": 1.0},
        "train": {"epochs": 1.0, "global_batch": {"tokens": 65536}},
        "eval": {"every_steps": 50},
        "checkpoint": {"every_steps": 50},
    }
    if method != "full":
        fields["adapter"] = {"r": 16, "alpha": 32.0, "targets": "all-linear"}
        fields["export"] = {"merge": True}
    if method == "qlora":
        fields["quantization"] = {"type": "nf4"}
        fields["optim"]["max_grad_norm"] = 0.3  # as in the QLoRA paper
    return fields


def comment_fields(chosen: dict[str, Any], loc: Loc = (), indent: str = "") -> Iterator[str]:
    """YAML lines of every field below `loc`: those of `chosen` as they are, others as comments with their default."""
    section = next(option for option in alternatives(schema_at(loc)) if "properties" in option)
    for name, field in section["properties"].items():
        at = (*loc, name)
        comment = f"  # {_describe(at)}"
        if not loc:
            yield ""
        value = chosen.get(name)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}:{comment}"
            for index, entry in enumerate(value):
                lines = list(comment_fields(entry, (*at, index), indent + "    "))
                yield f"{indent}  - {lines[0].lstrip()}"
                yield from lines[1:]
        elif any("properties" in option for option in alternatives(field)) and (value or not takes_null(field)):
            yield f"{indent}{name}:{comment}"
            yield from comment_fields(value or {}, at, indent + "  ")
        elif name in chosen:
            yield f"{indent}{name}: {dump_inline(value)}{comment}"
        else:
            yield f"{indent}# {name}: {dump_inline(field['default'])}{comment}"


def _describe(loc: Loc) -> str:
    """A field's description, and its choices where they are few words."""
    field = schema_at(loc) or {}
    described = [field, *(option for option in alternatives(field) if "properties" in option)]
    text = next((option["description"] for option in described if "description" in option), "")
    choices = describe(field)
    return f"{text} ({choices.removeprefix('one of ')})" if "enum" in field else text


def _fits(fields: dict[str, Any], gpu_memory: float) -> bool:
    needed = _needed_gib(fields)
    return needed is None or needed <= gpu_memory


def _needed_gib(fields: dict[str, Any]) -> float | None:
    """Memory of one GPU that the leanest setting takes, by the planner; None where the model's size is not known."""
    from trainer.planner import plan
    from trainer.planning.hardware import find_gpu
    from trainer.planning.job import Job

    config = RunConfig.model_validate(fields)
    shape = _find_shape(config.model)
    return min(candidate.needed for candidate in plan(Job(config, shape, find_gpu()))) / GIB if shape else None


def _find_shape(model: ModelConfig) -> ModelShape | None:
    """The model's shape if it is here or known, else of the known one nearest in size to what its name says."""
    from trainer.model.folder import read_sizes
    from trainer.model.shapes import SHAPES, published_shape
    from trainer.planning.shape import ModelShape

    if published_shape(model.path) or Path(model.path).expanduser().is_dir():
        return ModelShape.build(read_sizes(model))
    if not (said := SIZE.search(model.path.rpartition("/")[2].lower())):
        return None
    shapes = [ModelShape.build(sizes) for sizes in SHAPES.values()]
    return min(shapes, key=lambda shape: abs(shape.weights - float(said[1]) * 1e9))


def _num_positions(model: str) -> int:
    """Of a model that is here or known; as many as anybody could ask for of another."""
    from trainer.model.folder import read_sizes
    from trainer.model.shapes import published_shape

    known = published_shape(model) or Path(model).expanduser().is_dir()
    return (read_sizes(ModelConfig(path=model)) if known else {}).get("max_position_embeddings") or sys.maxsize


def _too_small(fields: dict[str, Any], method: str, gpu_memory: float, fitting: list[str]) -> UserError:
    fix = f"--method {fitting[0]}" if fitting else "a smaller model or a larger GPU"
    allowed = f"about {_needed_gib(fields):.0f} GiB for {fields['model']['path']} by {method}"
    return UserError("--gpu-memory", f"{gpu_memory:g} GiB", allowed, fix)
