"""YAML as recipes are written in it. No torch.

Plain scalars follow YAML 1.2: ``1e-4`` is a number (YAML 1.1 says text), ``yes`` and ``04:00:00`` are text (1.1 says
true and 14400).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

NULL, BOOL, INT, FLOAT, TEXT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
CORE_SCHEMA = {  # YAML 1.2.2, section 10.3.2, without hexadecimal, octal, .inf and .nan
    NULL: (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    BOOL: (r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    INT: (r"[-+]?[0-9]{1,18}$", list("-+0123456789")),
    FLOAT: (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, as in PyYAML


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, so that both read the same."""


for _tag, (_pattern, _first) in CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Text with line breaks and the like goes in double quotes, the one style that keeps all of them."""
    return dumper.represent_scalar(TEXT, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def compose(text: str) -> yaml.Node | None:
    """The document's nodes, with their lines; None when there is nothing in it.

    Raises:
        yaml.YAMLError: not YAML.
    """
    return yaml.compose(text, Loader=_Loader)


def read_scalar(node: yaml.Node) -> Any:
    """The value of a scalar node: None, bool, int, float or text.

    Raises:
        ValueError: it has a tag of its own, or one that its text does not fit.
    """
    read: dict[str, Callable[[str], Any]] = {
        NULL: lambda _: None,
        BOOL: lambda text: text.lower() == "true",
        INT: int,
        FLOAT: float,
        TEXT: str,
    }
    if node.tag not in read:
        raise ValueError(f"found the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}")
    pattern = CORE_SCHEMA.get(node.tag, ("",))[0]
    if not re.match(pattern, node.value):
        raise ValueError(f"found {node.value}, which is no {node.tag.rpartition(':')[2]}")
    return read[node.tag](node.value)


def dump(data: Any) -> str:
    """YAML in the order of `data`, one line a scalar."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def dump_inline(value: Any) -> str:
    """YAML of one value on one line, such as ``{tokens: 65536}``."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def describe_error(error: yaml.YAMLError) -> tuple[int, str]:
    """Line, from 1, and reason of a YAML error."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    return (mark.line + 1 if mark else 1), reason or str(error).replace("\n", " ")
