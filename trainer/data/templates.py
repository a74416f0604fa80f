"""Templates: how the messages of a row become one text, in training and in serving alike.

All are Jinja chat templates, rendered by ``apply_chat_template``, that is in transformers' sandbox. Alpaca's text is
one of them too, so whatever trained a model can be exported with it. The package's own are in ``jinja/``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError

from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

BUILT_IN = ("alpaca", "llama2", "llama3", "chatml")
# Without them as tokens of their own a model would have to spell its stop token.
TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
JINJA = Path(__file__).with_name("jinja")
WRITE_BOS = "{{- bos_token }}"
DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        name: as the recipe has it.
        text: Jinja source; None when the tokenizer's own was asked for and it has none.
        own: `text` is the tokenizer's own, unchanged.
        tools: functions that the conversations rendered may call.
    """

    name: str
    text: str | None
    own: bool
    tools: Sequence[dict[str, Any]] = ()

    def render(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> str:
        """The text of `messages`, special tokens and BOS included.

        Raises:
            UserError: there is no template.
            jinja2.TemplateError: the template refuses these messages.
        """
        self.check()
        bare = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        try:
            text = tokenizer.apply_chat_template(
                bare,
                tools=list(self.tools) or None,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=fixed_date,
            )
        except TemplateError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def check(self) -> None:
        """Raises `UserError` when there is no template."""
        if self.text is None:
            raise UserError(
                "data.template",
                "tokenizer, but this tokenizer has no chat template",
                "alpaca, llama2, llama3, chatml, or a .jinja file",
                "set `template: alpaca`, or the chat format wanted",
            )


def fixed_date(format: str) -> str:
    """What a template's ``strftime_now`` gives: rows are the same on every day. The date is that of Llama-3.1's own."""
    return date(2024, 7, 26).strftime(format)


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template a recipe names: ``tokenizer``, one of `BUILT_IN`, a ``.jinja`` file's path, or Jinja itself.

    Where the tokenizer puts BOS before every text and the template does not write it, the template is made to: text,
    training and serving (which tokenises rendered chats without adding anything) then have exactly one.

    Raises:
        UserError: no such template or file, its Jinja does not parse, or the tokenizer lacks its tokens.
    """
    text = _template_source(name, tokenizer)
    if text is None:
        return Template(name, None, own=True)
    pinned = DATE_CALL.sub(lambda match: repr(fixed_date(match[2])), text)  # when it is served, too
    template = Template(name, pinned, own=name == "tokenizer" and pinned == text)
    try:
        rendered = template.render(tokenizer, PROBE)
    except TemplateSyntaxError as error:
        raise UserError(
            "data.template", f"{name}: line {error.lineno}: {error.message}", fix="correct the Jinja"
        ) from error
    except TemplateError:
        return template  # it refuses the probe; whether it takes the rows is seen on the rows
    if adds_bos(tokenizer) and not rendered.startswith(str(tokenizer.bos_token)):
        return Template(name, WRITE_BOS + pinned, own=False)
    return template


def template_text(template: Template) -> str | None:
    """Jinja to export as the model's ``chat_template``; None: the tokenizer already carries the one used."""
    return None if template.own else template.text


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding a plain text puts BOS first."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _template_source(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if name == "tokenizer":
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    if name in BUILT_IN:
        _check_tokens(name, tokenizer)
        return (JINJA / f"{name}.jinja").read_text(encoding="utf-8")
    if "{{" in name or "{%" in name:
        return name
    allowed = ", ".join(["tokenizer", *BUILT_IN, "the path of a .jinja file", "Jinja itself"])
    if not name.endswith(".jinja"):
        raise UserError("data.template", f"{name!r} is no template", allowed, "choose one of these")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise UserError("data.template", f"cannot read {name}: {error}", allowed, "check the file") from error


def _check_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in TOKENS.get(name, ()) if token not in known]
    if missing:
        raise UserError(
            "data.template",
            f"{name} is written with {' and '.join(missing)}, and this tokenizer has no such token",
            "a template whose tokens the model knows",
            "set `template: tokenizer`, or alpaca, or name a tokenizer that has them in model.tokenizer",
        )
