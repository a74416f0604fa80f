"""`packtrain preprocess`: builds the data cache, and shows what will be trained on."""

from __future__ import annotations

import json as jsonlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from trainer.data.prepare import Splits
    from trainer.data.types import DataReport, TokenizedRow

PAGE_ROWS = 10
HISTOGRAM_BINS = 12


@dataclass(frozen=True)
class ShownRow:
    """A row for people.

    Attributes:
        title: where it comes from.
        pieces: text of each token, and whether it is trained.
    """

    title: str
    pieces: list[tuple[str, bool]]


def preprocess(
    recipe: Path,
    *,
    show: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    html: Path | None = None,
    json: bool = False,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Format, mask, tokenise, pack and cache a recipe's data; print what is trained on.

    Args:
        recipe: YAML file.
        show: print this many rows, their tokens coloured by trained or not.
        html: write table and rows as one offline page to this file.
        json: print one object a row and a summary last, and nothing else.
        overrides: dotted field -> value, laid over the recipe.
    """
    from trainer.data.prepare import load_splits
    from trainer.model.tokenizer import load_tokenizer
    from trainer.recipe import load_recipe

    config = load_recipe(recipe, overrides)
    tokenizer = load_tokenizer(config.model)
    splits = load_splits(config, tokenizer)
    if json:
        _print_json(splits, tokenizer)
    else:
        _print_tables(splits, config.data.pack_length)
        _print_rows(_shown_rows(splits, tokenizer, show))
    if html:
        from launch.preprocess_page import render_page

        page = render_page(
            str(recipe), figures(splits), histogram(splits), _shown_rows(splits, tokenizer, show or PAGE_ROWS)
        )
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page, encoding="utf-8")


def figures(splits: Splits) -> list[tuple[str, list[str]]]:
    """Lines of the table: name, then a cell for each split. The first line holds the splits' names."""
    reports = list(splits.reports.values())
    reasons = list(dict.fromkeys(reason for report in reports for reason in report.dropped))

    by_source = [packs.rows.sources() for _, packs in splits.items()]
    sources = list(dict.fromkeys(source for found in by_source for source in found))

    def line(name: str, cell: Any) -> tuple[str, list[str]]:
        return name, [cell(report) for report in reports]

    def of_source(source: str) -> tuple[str, list[str]]:
        return f"  of {source}", [f"{len(found.get(source, [])):,}" for found in by_source]

    return [
        ("", list(splits.reports)),
        line("rows", lambda r: f"{r.rows:,}"),
        *(of_source(source) for source in sources if len(sources) > 1),
        line("dropped", lambda r: f"{sum(r.dropped.values()):,}"),
        *(line(f"  {reason}", lambda r, why=reason: f"{r.dropped.get(why, 0):,}") for reason in reasons),
        line("cut to pack_length", lambda r: f"{r.truncated:,}"),
        line("tokens", lambda r: f"{r.tokens:,}"),
        line("trained tokens", lambda r: f"{r.trained_tokens:,}"),
        line("trained share", lambda r: f"{r.trained_tokens / r.tokens:.1%}"),
        line("packs", lambda r: f"{r.packs:,}"),
        line("fill", lambda r: f"{r.fill:.2%}"),
        line("longest row", lambda r: f"{max(r.lengths):,}"),
        line("median row", lambda r: f"{sorted(r.lengths)[len(r.lengths) // 2]:,}"),
    ]


def histogram(splits: Splits) -> list[tuple[str, int]]:
    """Number of training rows by range of their length in tokens."""
    lengths = splits.reports["train"].lengths
    width = max(1, -(-max(lengths) // HISTOGRAM_BINS))
    bins = Counter((length - 1) // width for length in lengths)
    return [(f"{i * width + 1}-{(i + 1) * width}", bins[i]) for i in range(max(bins) + 1)]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text each token adds. Tokens that hold part of a character add nothing, the last of them the character."""
    texts, done, start = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = str(tokenizer.decode(ids[start:done])), str(tokenizer.decode(ids[start:end]))
        if now.endswith("�") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, end
    return texts


def _shown_rows(splits: Splits, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ShownRow]:
    """By turns of each data set, and none twice that is trained on several times."""
    rows = splits.train.rows
    origins = rows.origins()
    first = {origin: i for i, origin in reversed(list(enumerate(origins)))}
    distinct = [[i for i in of_source if first[origins[i]] == i] for of_source in rows.sources().values()]
    by_turns = [i for turn in zip_longest(*distinct) for i in turn if i is not None]
    return [_shown_row(rows[i], tokenizer) for i in by_turns[:count]]


def _shown_row(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> ShownRow:
    from trainer.data.types import IGNORE_INDEX

    texts = map(_make_visible, token_texts(tokenizer, row.ids))
    trained = [label != IGNORE_INDEX for label in row.labels]
    title = f"{row.source}, row {row.row}: {len(row.ids)} tokens, {sum(trained)} trained"
    return ShownRow(title + (", cut" if row.truncated else ""), list(zip(texts, trained, strict=True)))


def _make_visible(text: str) -> str:
    """Control characters as pictures: data must not steer the reader's terminal."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␡" if 127 <= ord(c) < 160 else c for c in text
    )


def _print_json(splits: Splits, tokenizer: PreTrainedTokenizerBase) -> None:
    for line in _json_lines(splits, tokenizer):
        sys.stdout.write(jsonlib.dumps(line) + "\n")
    sys.stdout.flush()


def _json_lines(splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    from trainer.data.types import IGNORE_INDEX

    for _, packs in splits.items():
        for row in packs.rows:
            yield {
                "source": row.source,
                "row": row.row,
                "ids": row.ids,
                "tokens": tokenizer.convert_ids_to_tokens(row.ids),
                "trained": [int(label != IGNORE_INDEX) for label in row.labels],
            }
    reports = splits.reports
    yield {
        "summary": {**_summary(list(reports.values())), "splits": {name: _summary([r]) for name, r in reports.items()}}
    }


def _summary(reports: list[DataReport]) -> dict[str, Any]:
    """Counts over splits; `rows` are those trained on, `dropped` come on top."""
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    sums = {
        name: sum(getattr(r, name) for r in reports)
        for name in ("rows", "truncated", "tokens", "trained_tokens", "packs")
    }
    room = sum(report.tokens / report.fill for report in reports)
    return {**sums, "dropped": dict(dropped), "fill": sums["tokens"] / room}


def _print_tables(splits: Splits, pack_length: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    heading, *lines = figures(splits)
    table = Table(title=f"Packs of {pack_length} tokens", title_justify="left")
    table.add_column("")
    for name in heading[1]:
        table.add_column(name, justify="right")
    for name, cells in lines:
        table.add_row(Text(name), *cells)
    console.print(table)
    counts = histogram(splits)
    most = max(count for _, count in counts)
    bars = Table(title="Training rows by length in tokens", title_justify="left", box=None, show_header=False)
    for span, count in counts:
        bars.add_row(span, "█" * round(40 * count / most), f"{count:,}")
    console.print(bars)


def _print_rows(rows: list[ShownRow]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    mark = _colour if console.color_system else _bracket
    if rows:
        console.print(Text("\n").append(mark([("trained", True), (" not trained", False)])))
    for row in rows:
        console.print(Text(f"\n-- {row.title}", "bold"), soft_wrap=True)
        console.print(mark(row.pieces), soft_wrap=True)


def _colour(pieces: list[tuple[str, bool]]) -> Text:
    """Trained tokens on green, in two shades by turns so that their borders show."""
    from rich.text import Text

    shades = ("black on bright_green", "black on green")
    return Text.assemble(*((piece, shades[i % 2] if trained else "dim") for i, (piece, trained) in enumerate(pieces)))


def _bracket(pieces: list[tuple[str, bool]]) -> Text:
    """Trained stretches in brackets, for where there are no colours."""
    from rich.text import Text

    stretches = (
        "".join(text for text, _ in run) if not on else f"⟦{''.join(text for text, _ in run)}⟧"
        for on, run in groupby(pieces, key=itemgetter(1))
    )
    return Text("".join(stretches))
