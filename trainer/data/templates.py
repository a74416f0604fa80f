"""Templates: how the messages of a row become one text, in training and in serving alike.

All are Jinja chat templates, rendered by ``apply_chat_template``, that is in transformers' sandbox. Alpaca's text is
one of them too, so whatever trained a model can be exported with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# The text of github.com/tatsu-lab/stanford_alpaca. The line break after "Response:" keeps a token of the prompt from
# merging with the answer's first (":" and "//" are one token to Llama-2). A system message replaces the first sentence.
# A message that carries `instruction` and `input` gets the form with an input.
ALPACA = """\
{{- bos_token }}
{%- set plain = 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.' %}
{%- set paired = 'Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.' %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}
{%- if loop.first %}
{{- (paired if message.input else plain) + '\\n\\n' }}
{%- elif messages[loop.index0 - 1].role == 'assistant' %}
{{- '\\n\\n' }}
{%- endif %}
{%- if message.input %}
{{- '### Instruction:\\n' + message.instruction + '\\n\\n### Input:\\n' + message.input + '\\n\\n' }}
{%- else %}
{{- '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- endif %}
{%- elif message.role == 'assistant' %}
{{- '### Response:\\n' + message.content + eos_token }}
{%- else %}
{{- raise_exception('the alpaca template knows the roles system, user and assistant, not ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}"""

BUILT_IN = {"alpaca": ALPACA}
WRITE_BOS = "{{- bos_token }}"
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        name: as the recipe has it.
        text: Jinja source; None when the tokenizer's own was asked for and it has none.
        own: `text` is the tokenizer's own, unchanged.
    """

    name: str
    text: str | None
    own: bool

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
        text = tokenizer.apply_chat_template(
            bare, chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text

    def check(self) -> None:
        """Raises `UserError` when there is no template."""
        if self.text is None:
            raise UserError(
                "data.template",
                "tokenizer, but this tokenizer has no chat template",
                "alpaca, or a .jinja file",
                "set `template: alpaca`, or the .jinja file of the chat format wanted",
            )


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template a recipe names: ``tokenizer``, ``alpaca``, or the path of a ``.jinja`` file.

    Where the tokenizer puts BOS before every text and the template does not write it, the template is made to: text,
    training and serving (which tokenises rendered chats without adding anything) then have exactly one.

    Raises:
        UserError: no such template or file, or its Jinja does not parse.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    text = _template_source(name, tokenizer)
    if text is None:
        return Template(name, None, own=True)
    template = Template(name, text, own=name == "tokenizer")
    try:
        rendered = template.render(tokenizer, PROBE)
    except TemplateSyntaxError as error:
        raise UserError(
            "data.template", f"{name}: line {error.lineno}: {error.message}", fix="correct the Jinja"
        ) from error
    except TemplateError:
        return template  # it refuses the probe; whether it takes the rows is seen on the rows
    if adds_bos(tokenizer) and not rendered.startswith(str(tokenizer.bos_token)):
        return Template(name, WRITE_BOS + text, own=False)
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
        return BUILT_IN[name]
    allowed = ", ".join(["tokenizer", *BUILT_IN, "the path of a .jinja file"])
    if not name.endswith((".jinja", ".jinja2", ".j2")):
        raise UserError("data.template", f"{name!r} is no template", allowed, "choose one of these")
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("data.template", f"cannot read {name}: {error.strerror}", allowed, "check the path") from error
