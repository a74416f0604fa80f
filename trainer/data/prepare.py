"""From a recipe to splits ready to train on: draw, render, mask, pack, cache. Read this file first."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from trainer.config import DataConfig, RunConfig
from trainer.data.cache import (
    META,
    ArrowPacks,
    ArrowRows,
    RowWriter,
    content_key,
    fingerprint,
    open_or_build,
    write_packs,
)
from trainer.data.conversion import Reader, converting
from trainer.data.masking import ANSWER_TOO_FAR, TOO_LONG
from trainer.data.packing import keep_apart, pack_sequences
from trainer.data.recall import DataFacts, remember
from trainer.data.splits import Part, SplitName, all_sources, draw_splits
from trainer.data.templates import Template, load_template
from trainer.data.types import IGNORE_INDEX, DataReport, Example, TokenizedRow
from trainer.errors import PacktrainError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MOST_REASONS = 20


@dataclass
class Splits:
    """The data of a run.

    Attributes:
        reports: what became of each split's rows, by its name.
        fingerprint: of all splits' tokens, labels and packs; a resumed run must find the same.
        sources: blake3 of each source's whole content, by its place in the recipe, such as ``data.train[0]``.
    """

    train: ArrowPacks
    validation: ArrowPacks | None
    test: ArrowPacks | None
    reports: dict[str, DataReport]
    fingerprint: str
    sources: dict[str, str]

    def items(self) -> Iterator[tuple[SplitName, ArrowPacks]]:
        """The splits there are, by name."""
        named: list[tuple[SplitName, ArrowPacks | None]] = [
            ("train", self.train),
            ("validation", self.validation),
            ("test", self.test),
        ]
        return ((name, packs) for name, packs in named if packs is not None)


def load_splits(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, check: Callable[[], None] = lambda: None
) -> Splits:
    """Opens the splits of a recipe from the cache; builds them first where they are not there.

    Args:
        check: called now and then while they are built; what it raises ends that and leaves nothing behind.

    Raises:
        UserError: a source, column, template or length is wrong, or a split that is asked for has no rows.
    """
    data = config.data
    parts = draw_splits(config)
    template = load_template(data.template, tokenizer)
    _check_target(data, template, tokenizer)
    key = content_key(_describe(data, parts, template, tokenizer))
    folder = open_or_build(key, lambda folder: _build(folder, parts, template, tokenizer, data, check), check)
    names = [source.path for _, source in all_sources(data)]
    try:
        meta = json.loads((folder / META).read_text())
        counts, found = meta["splits"], meta["fingerprint"]
        packs = {name: ArrowPacks(folder / name, names) for name in counts}
        reports = {name: DataReport(**counts[name], lengths=packs[name].rows.lengths().tolist()) for name in counts}
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are ValueErrors
        raise PacktrainError(f"{folder}: this data cache is damaged: {error}\n  fix: delete the folder") from error
    remember(config, DataFacts.build(reports["train"]))
    return Splits(packs["train"], packs.get("validation"), packs.get("test"), reports, found, _hashes(data, parts))


def load_split_examples(config: RunConfig, split: SplitName, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of a split in order, those whose rows `load_splits` keeps.

    Raises:
        UserError: as `load_splits`; or the recipe has no such split.
    """
    return list(_iter_examples(config, split, tokenizer, kept_only=True))


def iter_split_examples(config: RunConfig, split: SplitName, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """All examples of a split, read as they are taken: whoever wants the first few need not read all."""
    return _iter_examples(config, split, tokenizer, kept_only=False)


def _iter_examples(
    config: RunConfig, split: SplitName, tokenizer: PreTrainedTokenizerBase, kept_only: bool
) -> Iterator[Example]:
    parts = draw_splits(config)
    if split not in parts:
        fix = f"set data.split.{split} to a share or to sources"
        raise UserError(f"data.split.{split}", f"the recipe has no {split} rows", fix=fix)
    kept = set(dict(load_splits(config, tokenizer).items())[split].rows.origins()) if kept_only else None
    read = Reader(load_template(config.data.template, tokenizer), tokenizer, config.data)
    for part in parts[split]:
        for chunk in part.chunks():
            examples, _ = read((part.source, part.columns, *chunk))
            yield from (example for example in examples if kept is None or (part.index, example.row) in kept)


def _check_target(data: DataConfig, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            "model.tokenizer",
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for",
            "a tokenizer with a tokenizer.json",
            "convert it, or name another in model.tokenizer",
        )
    for where, source in all_sources(data):
        if source.format not in ("text", "templated") or (source.format == "templated" and data.train_on != "all"):
            template.check()
        elif data.train_on != "all":
            raise UserError(
                "data.train_on",
                f"{data.train_on}, but {where} is plain text without an assistant",
                "all",
                "set `train_on: all`, or name the format of its conversations (templated if a template wrote them)",
            )


def _hashes(data: DataConfig, parts: dict[SplitName, list[Part]]) -> dict[str, str]:
    opened = {part.index: part.rows.content_hash for of_split in parts.values() for part in of_split}
    return {where: opened[i] for i, (where, _) in enumerate(all_sources(data)) if i in opened}


def _describe(
    data: DataConfig, parts: dict[SplitName, list[Part]], template: Template, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """All that the cached tokens depend on, but for this package's own code."""
    import tokenizers
    import transformers

    settings = data.model_dump(mode="json", include={"train_on", "pack_length", "packing", "long_rows"})
    sources = {
        name: [
            [
                part.rows.content_hash,
                part.source.format,
                part.columns,
                blake3(part.indices.tobytes()).hexdigest(),
                part.index,
            ]
            for part in of_split
        ]
        for name, of_split in parts.items()
    }
    return {
        "settings": settings,
        "sources": sources,
        "template": template.text,
        "tokenizer": [
            tokenizer.backend_tokenizer.to_str(),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        ],
        "versions": [tokenizers.__version__, transformers.__version__],
    }


def _build(
    folder: Path,
    parts: dict[SplitName, list[Part]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    check: Callable[[], None],
) -> None:
    """Fills a cache folder."""
    num_rows = {name: sum(len(part.indices) for part in of_split) for name, of_split in parts.items()}
    meta: dict[str, dict[str, Any]] = {}
    with converting(template, tokenizer, data, sum(num_rows.values())) as convert, _progress(num_rows) as advance:
        for name, of_split in parts.items():
            report, num_read = DataReport(), num_rows[name]
            with RowWriter(folder / name) as writer:
                tasks = (
                    (part.index, (part.source, part.columns, *chunk)) for part in of_split for chunk in part.chunks()
                )
                by_source: dict[int, tuple[int, Counter[str]]] = {}
                for source_index, (rows, reasons) in convert(tasks):
                    check()
                    writer.write(rows, source_index)
                    _count(report, rows)
                    kept, why = by_source.get(source_index, (0, Counter()))
                    by_source[source_index] = kept + len(rows), why + Counter(reasons)
                    advance(name, len(rows) + len(reasons))
            dropped = sum((why for _, why in by_source.values()), Counter())
            report.dropped = _fold(dropped)
            if report.rows == 0:
                raise _nothing_left(name, num_read, report.dropped, data)
            if name == "train":
                _check_sources(data, by_source)
            _pack(folder / name, report, data)
            meta[name] = {k: v for k, v in vars(report).items() if k != "lengths"}
    found = fingerprint([folder / name for name in meta])
    (folder / META).write_text(json.dumps({"splits": meta, "fingerprint": found}, indent=1))


def _check_sources(data: DataConfig, by_source: dict[int, tuple[int, Counter[str]]]) -> None:
    """Refuses a source to train on of which no row is left: its absence would not be noticed."""
    for index, (kept, why) in by_source.items():
        if not kept:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in _fold(why).items())
            raise UserError(
                f"data.train[{index}]",
                f"all {why.total()} rows of {data.train[index].path} are refused: {reasons}",
                "rows of the format that it says, and a template under which the tokens to train on are certain",
                "look at the reasons: correct its format or columns, data.template, or leave it out",
            )


def _fold(dropped: Counter[str]) -> dict[str, int]:
    """The most common reasons, and how many rows the others are: a template may say a reason of its own for each."""
    common = dropped.most_common()
    rest = sum(count for _, count in common[MOST_REASONS:])
    return dict(common[:MOST_REASONS]) | ({"other reasons": rest} if rest else {})


def _count(report: DataReport, rows: Iterable[TokenizedRow]) -> None:
    for row in rows:
        report.rows += 1
        report.truncated += row.truncated
        report.tokens += len(row.ids)
        report.trained_tokens += len(row.labels) - row.labels.count(IGNORE_INDEX)


def _pack(folder: Path, report: DataReport, data: DataConfig) -> None:
    lengths = ArrowRows(folder, []).lengths()
    packs = pack_sequences(lengths, data.pack_length) if data.packing else keep_apart(len(lengths))
    write_packs(folder, packs)
    report.packs = len(packs)
    report.fill = report.tokens / (report.packs * data.pack_length)


def _nothing_left(split: str, num_read: int, dropped: dict[str, int], data: DataConfig) -> UserError:
    """Why all rows of a split were dropped."""
    reasons = "; ".join(f"{reason} ({count})" for reason, count in dropped.items())
    if dropped.keys() <= {TOO_LONG, ANSWER_TOO_FAR}:
        found = f"{data.pack_length}, and all {num_read} rows of {split} are too long for it: {reasons}"
        return UserError("data.pack_length", found, fix="raise data.pack_length")
    return UserError(
        "data",
        f"all {num_read} rows of {split} are refused: {reasons}",
        "rows of the format that their source says, and a template under which the tokens to train on are certain",
        "look at the reasons: correct a source's format or columns, data.template, or the rows",
    )


def log_report(name: str, report: DataReport) -> None:
    """Logs what became of a split's rows; what was dropped or cut is a warning."""
    log.info(
        "%s: %d row%s in %d pack%s, %d tokens (%.1f%% trained), fill %.2f%%",
        name,
        report.rows,
        "s" * (report.rows != 1),
        report.packs,
        "s" * (report.packs != 1),
        report.tokens,
        100 * report.trained_tokens / report.tokens,
        100 * report.fill,
    )
    for reason, count in report.dropped.items():
        log.warning("%s: %d row%s dropped: %s", name, count, "s" * (count != 1), reason)
    if report.truncated:
        text = "%s: %d row%s cut to data.pack_length, without the stop token"
        log.warning(text, name, report.truncated, "s" * (report.truncated != 1))


@contextmanager
def _progress(num_rows: dict[SplitName, int]) -> Iterator[Callable[[str, int], None]]:
    """Yields ``advance(split, rows)``; draws bars on a terminal and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda split, rows: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bars = {str(name): progress.add_task(f"tokenising {name}", total=total) for name, total in num_rows.items()}
        yield lambda split, rows: progress.advance(bars[split], rows)
