"""Recipes: a YAML file and dotted overrides become a RunConfig, or one error that lists all that is wrong. No torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config import RunConfig, SlurmConfig
from trainer.errors import UserError
from trainer.recipe_schema import (
    Loc,
    describe,
    dotted,
    field_names,
    is_list,
    json_schema,
    nearest_field,
    schema_at,
    takes_null,
    takes_only_text,
)
from trainer.recipe_yaml import NULL, TEXT, compose, describe_error, dump, read_scalar

__all__ = ["RecipeError", "dump_recipe", "json_schema", "load_profile", "load_recipe", "split_overrides"]

Origin = tuple[int, str]  # place in the order of problems; file:line or --option
SLURM = "slurm"
RECIPE, PROFILE = "a recipe", "a cluster's profile"
LAST = 10**9  # overrides come after every line of the file


class RecipeError(UserError):
    """Everything wrong with a recipe, the profile under it and its overrides.

    Attributes:
        problems: one `UserError` each, in the order of the file.
    """

    def __init__(self, paths: list[Path], problems: list[UserError]) -> None:
        super().__init__(" with ".join(map(str, paths)), f"{len(problems)} errors")
        self.problems = problems
        heading = [f"{self.where}: {self.found}"] if len(problems) > 1 else []
        self.args = ("\n".join([*heading, *map(str, problems)]),)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None, cluster: Path | None = None) -> RunConfig:
    """Reads a recipe, lays a cluster's profile under its ``slurm`` section and overrides over all of it.

    Values are taken strictly: ``"5"`` is not a number and 5 is not text. Relative paths inside a recipe (model, data,
    template) are relative to the current folder, not to the recipe's.

    Args:
        path: a YAML file.
        overrides: dotted field -> value, such as ``{"optim.lr": "1e-4", "data.train[0].path": "my.jsonl"}``. Text is
            read as YAML, except where the field takes nothing but text; other values are taken as they are. A section
            that the recipe lacks is created.
        cluster: a YAML file of `SlurmConfig`'s fields; what the recipe says itself counts more.

    Raises:
        UserError: there is no mapping to read: missing file, not YAML, empty.
        RecipeError: something in it is wrong. All of it is reported at once, each with file, line, field, what was
            found and what is allowed. Rules between fields are judged when each field by itself is right.
    """
    draft = Draft(Path(path))
    if cluster:
        draft.lay_under(cluster, SLURM)
    for name, value in (overrides or {}).items():
        draft.override(name, value)
    return draft.finish()


def load_profile(path: Path) -> SlurmConfig:
    """Reads a cluster's profile by itself.

    Raises:
        UserError, RecipeError: as `load_recipe`.
    """
    nothing = {"model": {"path": "any"}, "data": {"train": [{"path": "any", "format": "text"}]}}
    draft = Draft(Path(path), (SLURM,))
    draft.data = nothing | {SLURM: draft.data}
    return draft.finish().slurm


def split_overrides(tokens: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Takes the overrides out of command-line tokens: ``--optim.lr 1e-4``, ``--optim.lr=1e-4`` or ``--adapter null``.

    An override is an option with a dot in its name, or the bare name of a section.

    Returns:
        overrides for `load_recipe`, and all other tokens in their order.

    Raises:
        UserError: an override without a value, or given twice.
    """
    overrides: dict[str, str] = {}
    rest: list[str] = []
    queue = iter(tokens)
    for token in queue:
        name, equals, value = token.removeprefix("--").partition("=")
        if token == "--":
            return overrides, [*rest, token, *queue]
        if not token.startswith("--") or not ("." in name or name in RunConfig.model_fields):
            rest.append(token)
            continue
        if not equals:
            value = next(queue, "--")
            if value.startswith("--"):
                raise UserError(token, "has no value", fix=f"{token} VALUE, or {token}=VALUE if that begins with --")
        if name in overrides:
            raise UserError(f"--{name}", "given twice", fix="keep one of them")
        overrides[name] = value
    return overrides, rest


def dump_recipe(config: RunConfig) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal config."""
    return dump(config.model_dump(mode="json"))


class Draft:
    """A recipe on its way to a RunConfig: plain data, where each value was written, and what is wrong so far.

    Attributes:
        paths: its file, and the profile's that lies under it.
        data: the recipe as dicts, lists and scalars.
        origins: where each value was written.
        texts: how a value was written, where it is not text.
        problems: what is wrong, with its place in the order.
        refused: values that are wrong already, before their field is asked.
    """

    def __init__(self, path: Path, loc: Loc = ()) -> None:
        """Reads a file, which holds the section at `loc`."""
        self.paths = [path]
        self.origins: dict[Loc, Origin] = {}
        self.texts: dict[Loc, str] = {}
        self.problems: list[tuple[int, UserError]] = []
        self.refused: set[Loc] = set()
        node = _compose_file(path, loc)
        self.data: dict[str, Any] = self.read(node, loc, lambda line: (line, f"{path}:{line}"))

    def lay_under(self, path: Path, section: str) -> None:
        """Takes what `section` leaves open from a file of that section alone."""
        under = Draft(path, (section,))
        own = self.data.get(section)
        if own is not None and not isinstance(own, dict):
            return  # wrong by itself
        taken = under.data.keys() - (own or {}).keys()
        self.data[section] = {**under.data, **(own or {})}
        self.origins.setdefault((section,), under.origins[(section,)])
        self.origins |= {loc: origin for loc, origin in under.origins.items() if taken.intersection(loc[1:2])}
        self.texts |= {loc: text for loc, text in under.texts.items() if taken.intersection(loc[1:2])}
        self.refused |= {loc for loc in under.refused if taken.intersection(loc[1:2])}
        self.problems += under.problems
        self.paths += under.paths if taken else []

    def read(
        self, node: yaml.Node, loc: Loc, origin: Callable[[int], Origin], above: tuple[yaml.Node, ...] = ()
    ) -> Any:
        """A YAML node as plain data; `origin` makes an `Origin` of a line, `above` are the nodes that hold it."""
        self.origins.setdefault(loc, origin(node.start_mark.line + 1))
        if node in above:
            return self.refuse(loc, "contains itself")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return self.read_mapping(node, loc, origin, above)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*loc, index), origin, above) for index, item in enumerate(node.value)]
        if node.tag != TEXT:
            self.texts[loc] = node.value
        try:
            return read_scalar(node)
        except ValueError as error:
            return self.refuse(loc, str(error), "plain YAML without tags")

    def read_mapping(
        self, node: yaml.Node, loc: Loc, origin: Callable[[int], Origin], above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = origin(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                self.add_problem(here, loc, "has a key that is not a name", "name: value")
            elif key_node.value in data:
                at = (*loc, key_node.value)
                self.add_problem(here, at, f"given twice, first at {self.origins[at][1]}", fix="keep one of them")
            else:
                at = (*loc, key_node.value)
                self.origins[at] = here
                data[key_node.value] = self.read(value_node, at, origin, above)
        return data

    def override(self, name: str, value: Any) -> None:
        """Puts `value` at the dotted field `name`."""
        option: Origin = (LAST, f"--{name}")
        loc: Loc = ()
        for part in re.sub(r"\[(\d+)\]", r".\1", name).split("."):
            loc = (*loc, int(part) if part.isdecimal() and is_list(schema_at(loc)) else part)
            if schema_at(loc) is None:
                return self.add_unknown_field(option, loc)
        if obstacle := self.open_path(loc):
            fix = f"write {dotted(loc[:-1])} in the recipe"
            return self.problems.append((LAST, UserError(option[1], obstacle, fix=fix)))
        for table in (self.origins, self.texts, self.refused):
            for old in [old for old in table if old[: len(loc)] == loc]:
                table.pop(old) if isinstance(table, dict) else table.remove(old)
        self.origins[loc] = option
        section = self.value_at(loc[:-1])
        section[loc[-1]] = self.read_override(value, loc) if isinstance(value, str) else value

    def open_path(self, loc: Loc) -> str:
        """Creates the sections above `loc` that are absent. Returns what stands in the way, if anything."""
        here: Any = self.data
        for depth, key in enumerate(loc):
            if isinstance(key, int) and not isinstance(here, list):
                return f"{dotted(loc[:depth])} is no list in the recipe"
            if isinstance(key, int) and key >= len(here):
                return f"{dotted(loc[:depth])} has {len(here)} entries in the recipe, counted from 0"
            if isinstance(key, str) and not isinstance(here, dict):
                return f"{dotted(loc[:depth])} is no section in the recipe"
            if depth + 1 < len(loc):
                if isinstance(key, str) and here.get(key) is None and isinstance(loc[depth + 1], str):
                    here[key] = {}
                here = here[key] if isinstance(key, int) else here.get(key)
        return ""

    def read_override(self, text: str, loc: Loc) -> Any:
        """An override's text as a value: YAML, but a field that is text takes ``1234567`` or ``[INST]`` as it is."""
        only_text = takes_only_text(schema_at(loc))
        try:
            node = compose(text)
        except yaml.YAMLError as error:
            return text if only_text else self.refuse(loc, f"not valid YAML: {describe_error(error)[1]}")
        if only_text and (node is None or node.tag not in (TEXT, NULL)):
            return text
        return None if node is None else self.read(node, loc, lambda _: self.origins[loc])

    def finish(self) -> RunConfig:
        """The config.

        Raises:
            RecipeError: all that is wrong.
        """
        config = self.validate()
        if config is None or self.problems:
            problems = sorted(self.problems, key=lambda item: item[0])
            raise RecipeError(self.paths, [problem for _, problem in problems])
        return config

    def validate(self) -> RunConfig | None:
        """The config, or None and what is wrong in `problems`."""
        _drop_empty_sections(self.data)
        try:
            # pydantic's strict mode takes no dict for a section and no list for a tuple, unless they come as JSON
            return RunConfig.model_validate_json(json.dumps(self.data, default=str), strict=True)
        except ValidationError as error:
            details = {_real_loc(detail): detail for detail in error.errors(include_url=False)}
        for loc, detail in details.items():
            # where a value may be this or that, the alternative that got further says more
            if not any(other[: len(loc)] == loc and len(other) > len(loc) for other in details):
                self.explain(loc, detail)
        return None

    def explain(self, loc: Loc, detail: Any) -> None:
        """Turns one of pydantic's errors into a problem: field, what was found, what is allowed."""
        allowed = describe(schema_at(loc))
        if detail["type"] == "extra_forbidden":
            self.add_unknown_field(self.origin_of(loc), loc)
        elif detail["type"] == "missing":
            self.add_problem(self.origin_of(loc), loc, "missing", allowed)
        elif detail["type"] == "value_error":
            for rule in str(detail["ctx"]["error"]).splitlines():
                self.explain_rule(loc, rule)
        elif loc not in self.refused:
            value = self.value_at(loc)
            found = f"found {self.texts.get(loc) or _show(value)}"
            self.add_problem(self.origin_of(loc), loc, found, allowed, _hint(value, self.texts.get(loc), loc))

    def explain_rule(self, loc: Loc, rule: str) -> None:
        """A broken rule between fields; its text begins with the field it is about."""
        name = re.match(r"[a-z_.]*[a-z_]", rule)
        about = (*loc, *name[0].split(".")) if name else loc
        if schema_at(about) is None:
            self.add_problem(self.origin_of(loc), loc, rule)
        else:
            order, where = self.origin_of(about)
            named = where == f"--{dotted(about)}"
            self.problems.append((order, UserError(where, rule.removeprefix(f"{dotted(about)}: ") if named else rule)))

    def refuse(self, loc: Loc, found: str, allowed: str = "") -> None:
        """Adds a problem with the value at `loc`, which is then read as null."""
        self.refused.add(loc)
        self.add_problem(self.origin_of(loc), loc, found, allowed)

    def add_unknown_field(self, origin: Origin, loc: Loc) -> None:
        names, nearest = field_names(schema_at(loc[:-1])), nearest_field(loc)
        allowed = ", ".join(names) or f"no fields below {dotted(loc[:-1])}"
        self.add_problem(origin, loc, "unknown field", allowed, f"did you mean {nearest}?" if nearest else "")

    def add_problem(self, origin: Origin, loc: Loc, found: str, allowed: str = "", fix: str = "") -> None:
        order, where = origin
        name = "" if where.startswith("--") and where == f"--{dotted(loc)}" else dotted(loc)
        self.problems.append((order, UserError(f"{where}: {name}" if name else where, found, allowed, fix)))

    def origin_of(self, loc: Loc) -> Origin:
        """Where `loc` was written, or else the nearest section around it."""
        return next(self.origins[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in self.origins)

    def value_at(self, loc: Loc) -> Any:
        here: Any = self.data
        for key in loc:
            here = here[key]
        return here


def _compose_file(path: Path, loc: Loc) -> yaml.Node:
    """The top mapping of a file that holds the section at `loc`. Raises UserError where there is none."""
    allowed = describe(schema_at(loc))
    try:
        node = compose(_read_text(path, PROFILE if loc else RECIPE))
    except yaml.YAMLError as error:
        line, reason = describe_error(error)
        raise UserError(f"{path}:{line}", f"not valid YAML: {reason}") from error
    if node is None:
        raise UserError(str(path), "the file is empty", allowed)
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path}:{node.start_mark.line + 1}", f"found {kind}", allowed)
    return node


def _read_text(path: Path, kind: str) -> str:
    if path.is_dir():
        raise UserError(str(path), "is a folder", f"{kind}, which is a YAML file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, cutoff=0.8)
        fix = "packtrain init --out FILE writes a recipe" if kind == RECIPE else f"name {kind}"
        raise UserError(str(path), "no such file", fix=f"did you mean {folder / near[0]}?" if near else fix) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", allowed=f"{kind}, which is YAML in UTF-8") from error


def _drop_empty_sections(data: dict[str, Any], loc: Loc = ()) -> None:
    """Takes sections without a line in them, where all may be comments, as left out."""
    for name, value in list(data.items()):
        schema = schema_at((*loc, name))
        if value is None and field_names(schema) and not takes_null(schema):
            del data[name]
        elif isinstance(value, dict):
            _drop_empty_sections(value, (*loc, name))


def _real_loc(detail: Any) -> Loc:
    """Location of pydantic's error without its names for a union's alternatives, such as ``list[Source]``."""
    real: Loc = ()
    for index, key in enumerate(detail["loc"]):
        is_unknown = detail["type"] == "extra_forbidden" and index + 1 == len(detail["loc"])
        if is_unknown or schema_at((*real, key)) is not None:
            real = (*real, key)
    return real


def _show(value: Any) -> str:
    """A value as it would be written on one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(value: Any, text: str | None, loc: Loc) -> str:
    """The fix where quotes are too many or too few."""
    schema = schema_at(loc)
    if isinstance(value, str) and not takes_only_text(schema):
        node = compose(value) if re.fullmatch(r"[\w.+-]+", value) else None
        return f"take the quotes away: {value}" if node is not None and node.tag not in (TEXT, NULL) else ""
    if takes_only_text(schema) and text:
        return f'put it in quotes: "{text}"'
    return ""
