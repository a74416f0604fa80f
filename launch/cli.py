"""`packtrain`: one command for everything. A command's module is imported when asked for, so help comes at once."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter, Token, UnknownOptionError, convert

from trainer.config_rules import is_address
from trainer.errors import EXIT_DONE, EXIT_USER_ERROR, PacktrainError, UserError, explain_os_error

COMMANDS = {  # name -> where its function is, and its line in the list of commands
    "init": ("launch.init:init", "Write a commented recipe for a model, data and hardware."),
    "schema": ("launch.schema:schema", "Print the recipe's JSON schema, for completion in an editor."),
    "preprocess": ("launch.preprocess:preprocess", "Tokenise, mask, pack and cache the data; show what is trained on."),
    "plan": ("launch.plan:plan", "Predict memory and speed of a recipe; choose sizes; say what else would fit."),
    "train": ("launch.train:train", "Train a recipe on this host; resumes by itself."),
    "submit": ("launch.submit:submit", "Queue a recipe on SLURM; it survives time limits and lost nodes."),
    "status": ("launch.status:status", "Show where submitted runs stand."),
    "logs": ("launch.logs:logs", "Show what a run prints; -f follows it across restarts."),
    "cancel": ("launch.cancel:cancel", "Have a submitted run save a checkpoint and stop for good."),
    "merge": ("launch.export:merge", "Merge a run's adapter into its base."),
    "evaluate": ("launch.evaluate:evaluate", "Loss, accuracy and exact match of models on a split, in one table."),
    "verify": ("launch.export:verify", "Prove that a merged model is the one that was trained."),
    "generate": ("launch.inference:generate", "Answer prompts."),
    "chat": ("launch.inference:chat", "Talk with a model."),
    "serve": ("launch.serve:serve", "Serve a model by vLLM, proven to read prompts as in training."),
    "push": ("launch.push:push", "Send an adapter or a model to the Hugging Face Hub, with its card."),
    "report": ("launch.report:report", "Write one offline HTML page about a run."),
    "doctor": ("launch.doctor:doctor", "Check this host, its environment and its cluster; say how to mend what fails."),
}
TAKE_OVERRIDES = {"preprocess", "plan", "train", "submit"}
OVERRIDES_HELP = "Any field of the recipe can be overridden by its dotted name: `--optim.lr 1e-4`, `--adapter null`."
INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(tokens: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong input, 75 stopped in order to be resumed, 130 interrupted.
    """
    _show_own_log()
    try:
        _run(list(sys.argv[1:] if tokens is None else tokens))
        return EXIT_DONE
    except PacktrainError as error:
        return _tell(error)
    except CycloptsError:  # cyclopts has printed it
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; at exit Python would flush and fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        return _tell(explain_os_error(error))


def _tell(error: PacktrainError) -> int:
    print(error, file=sys.stderr)
    return error.exit_status


def build_app(chosen: str = "") -> App:
    """The commands; `chosen` says of itself what its docstring says, of the others only their line is known."""
    app = App(
        name="packtrain",
        help="Fine-tune Llama-family models from a recipe.",
        version=_version,
        default_parameter=Parameter(negative_iterable=(), converter=_convert),
    )
    for position, (name, (function, summary)) in enumerate(COMMANDS.items()):
        app.command(
            function,
            name=name,
            help=None if name == chosen else summary,
            sort_key=position,
            help_epilogue=OVERRIDES_HELP if name in TAKE_OVERRIDES else None,
        )
    return app


def _convert(kind: Any, tokens: Sequence[Token]) -> Any:
    """What was given, as its parameter's type. By itself cyclopts would round 1.5 to 2, and make a path of s3://..."""
    if kind is int and not re.fullmatch(r"[+-]?[0-9]+", tokens[-1].value):
        found = f"found {tokens[-1].value!r}"
        raise UserError(str(tokens[-1].keyword), found, "a whole number", "write digits alone, such as 4")
    if kind is Path and is_address(tokens[-1].value):
        where, fix = tokens[-1].keyword or "path", "copy it to or from this host yourself, and name the path here"
        raise UserError(where, f"{tokens[-1].value} is an address", "a path on this host", fix)
    return convert(kind, tokens)


def _run(tokens: list[str]) -> None:
    chosen = tokens[0] if tokens else ""
    overrides: dict[str, str] = {}
    if chosen in TAKE_OVERRIDES:
        from trainer.recipe import split_overrides

        overrides, tokens = split_overrides(tokens)
    try:
        command, bound, not_parsed = build_app(chosen).parse_args(tokens, exit_on_error=False)
    except UnknownOptionError as error:
        option = error.token.keyword or error.token.value
        if chosen in TAKE_OVERRIDES:
            _name_field(option)
        if chosen == "serve":
            _name_place(option)
        raise
    injected = {"overrides": overrides} if "overrides" in not_parsed else {}
    command(*bound.args, **bound.kwargs, **injected)


def _name_field(option: str) -> None:
    """Where ``--lr`` was given, says that the recipe has an ``optim.lr``."""
    from trainer.recipe_schema import nearest_field

    if nearest := nearest_field((option.lstrip("-").partition("=")[0],)):
        print(f"A recipe's field is named in full, such as --{nearest}", file=sys.stderr)


def _name_place(option: str) -> None:
    """Where an option of vLLM's was given to `serve` itself, says where it goes."""
    from launch.serve import OWN_OPTIONS

    if instead := OWN_OPTIONS.get(option.replace("_", "-")):
        print(f"What vLLM calls {option}, {instead} sets here", file=sys.stderr)
    else:
        print(f"vLLM's own options go after --: packtrain serve DIR -- {option} ...", file=sys.stderr)


def _show_own_log() -> None:
    """What packtrain's own modules log at INFO goes to stderr; from libraries, warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("launch", "slurm", "trainer"):
        logging.getLogger(package).setLevel(logging.INFO)


def _version() -> str:
    from importlib.metadata import version

    return version("packtrain")


if __name__ == "__main__":
    sys.exit(main())
