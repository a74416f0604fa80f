"""The recipe's JSON schema, and what is said from it: what a field allows, which name was meant. No torch."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.config import RunConfig

Loc = tuple[str | int, ...]
Schema = dict[str, Any]


@functools.cache
def json_schema() -> Schema:
    """JSON schema (draft 2020-12) of a recipe, for an editor's completion and checks."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "packtrain recipe"}


def alternatives(schema: Schema | None) -> Iterator[Schema]:
    """What a value may be: the schema itself, or each branch of its union, with references followed."""
    if schema is None:
        return
    if "$ref" in schema:
        schema = json_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" not in schema:
        yield schema
    for branch in schema.get("anyOf", []):
        yield from alternatives(branch)


def child_schema(schema: Schema | None, key: str | int) -> Schema | None:
    """Schema of the field or entry `key` below `schema`; None where there is none."""
    for option in alternatives(schema):
        if isinstance(key, str) and key in option.get("properties", {}):
            return option["properties"][key]
        if isinstance(key, str) and (value := _value_schema(option, key)):
            return value
        if isinstance(key, int) and option.get("type") == "array":
            places = option.get("prefixItems", [])
            return places[key] if key < len(places) else option.get("items")
    return None


def _value_schema(option: Schema, key: str) -> Schema | None:
    """Of a mapping whose keys are names of the user's choice, perhaps of a certain form or out of a few."""
    for pattern, value in option.get("patternProperties", {}).items():
        if re.search(pattern, key):
            return value
    names, value = option.get("propertyNames", {}).get("enum"), option.get("additionalProperties")
    return value if isinstance(value, dict) and (names is None or key in names) else None


def schema_at(loc: Loc) -> Schema | None:
    """Schema of the field at `loc`."""
    schema: Schema | None = json_schema()
    for key in loc:
        schema = child_schema(schema, key)
    return schema


def field_names(schema: Schema | None) -> list[str]:
    """Names of the fields below `schema`."""
    return [name for option in alternatives(schema) for name in option.get("properties", {})]


def is_list(schema: Schema | None) -> bool:
    """Whether entries below `schema` are counted."""
    return any(option.get("type") == "array" for option in alternatives(schema))


def takes_null(schema: Schema | None) -> bool:
    """Whether null is a value."""
    return any(option.get("type") == "null" for option in alternatives(schema))


def takes_only_text(schema: Schema | None) -> bool:
    """Whether any text is a value and nothing else is, but null."""
    types = [option.get("type") for option in alternatives(schema) if option.keys() & {"const", "enum"} == set()]
    return "string" in types and set(types) <= {"string", "null"}


def describe(schema: Schema | None) -> str:
    """What a field allows, in words: ``a number above 0, or null``."""
    return ", or ".join(dict.fromkeys(_describe_option(option) for option in alternatives(schema)))


def dotted(loc: Iterable[str | int]) -> str:
    """A field's name: ``data.train[0].path``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc).removeprefix(".")


def nearest_field(loc: Loc) -> str | None:
    """The field that was probably meant by the unknown `loc`: in the same section, else elsewhere."""
    section, key = loc[:-1], str(loc[-1]).lower().replace("-", "_")
    siblings = [(*section, name) for name in field_names(schema_at(section))]
    for fields, least in ((siblings, 0.6), (list(_all_fields()), 0.7)):
        likeness, field = max(((_likeness(key, str(field[-1])), field) for field in fields), default=(0.0, ()))
        if likeness >= least:
            return dotted(field)
    return None


def _likeness(key: str, name: str) -> float:
    """0 to 1. Initials (``learning_rate``, ``lr``) and common words count, the last word most (``lora_alpha``)."""
    words, others = [word for word in key.split("_") if word], name.split("_")
    score = difflib.SequenceMatcher(None, key, name).ratio()
    if set(words) & set(others) or name == "".join(word[0] for word in words):
        score = max(score, 0.7)
    return max(score, 0.8) if words[-1:] == others[-1:] else score


def _all_fields(loc: Loc = ()) -> Iterator[Loc]:
    """Every field outside lists."""
    for name in field_names(schema_at(loc)):
        yield (*loc, name)
        yield from _all_fields((*loc, name))


def _describe_option(option: Schema) -> str:
    if "const" in option:
        return str(option["const"])
    if "enum" in option:
        return "one of " + ", ".join(str(value) for value in option["enum"])
    match option.get("type"):
        case "number" | "integer" as kind:
            return {"number": "a number", "integer": "a whole number"}[kind] + _describe_range(option)
        case "array":
            return _describe_list(option)
        case "object" if "properties" in option:
            return "a section with " + ", ".join(option["properties"])
        case "object" if names := option.get("propertyNames", {}).get("enum"):
            return f"a mapping of {', '.join(names)} to {describe(option['additionalProperties'])}"
        case "object":
            return "a mapping of names to text"
        case kind:
            return {"boolean": "true or false", "string": "text", "null": "null"}[str(kind)]


def _describe_range(option: Schema) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {option[name]:g}" for name, word in words.items() if name in option]
    return " " + " and ".join(bounds) if bounds else ""


def _describe_list(option: Schema) -> str:
    if places := option.get("prefixItems"):
        return f"a list of {len(places)}: " + ", ".join(describe(place) for place in places)
    at_least = f" of at least {option['minItems']}" if "minItems" in option else ""
    return f"a list{at_least}, each {describe(option['items'])}"
