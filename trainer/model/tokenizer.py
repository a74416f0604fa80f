"""The model's tokenizer, checked against its embeddings."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.weights import load_base_config

# What transformers raises of files that are missing or broken.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
TOKENIZER_CONFIG = "tokenizer_config.json"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")  # Llama 3.1 and later, Llama 3


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token; vocabulary and chat template as they come.

    A missing pad token becomes the unknown or a reserved token, and the end token only where there is neither: labels
    are masked by position, never by the pad id, so a model still learns to stop.

    Raises:
        UserError: there is no tokenizer, or it has tokens that the model has no embedding for.
    """
    path = config.tokenizer or config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=None if config.tokenizer else config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        if not config.tokenizer and not Path(path).expanduser().is_dir():
            raise UserError(
                "model.path",
                f"{path!r} is no folder, and the hub did not give it: {reason}",
                "a folder, or a hub id such as owner/name",
                "check name, revision and network, or name a local folder; gated models want `hf auth login`",
            ) from error
        raise UserError(
            "model.tokenizer" if config.tokenizer else "model.path",
            f"no tokenizer to be had from {path!r}: {reason}",
            "a folder with tokenizer files, or a hub id",
            "name one in model.tokenizer",
        ) from error
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        reserved = next((token for token in PAD_TOKENS if token in vocabulary), None)
        tokenizer.pad_token = tokenizer.unk_token or reserved or tokenizer.eos_token
    _check_vocabulary(tokenizer, config)
    return tokenizer


def load_saved_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in an adapter's folder, exactly as it was saved: pad token and all.

    It may have more tokens than the base has embeddings, where the adapter brings them.

    Raises:
        UserError: a file of it is missing or broken.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        is_missing = not any((folder / name).exists() for name in names)
        found = "no such file" if is_missing else f"cannot be read: {' '.join(str(error).split())[:300]}"
        fix = f"copy it there again; or delete {folder / TOKENIZER_CONFIG}, and the base's tokenizer is taken"
        allowed = f"the tokenizer that {TOKENIZER_CONFIG} beside it is of"
        raise UserError(str(folder / names[0]), found, allowed, fix) from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Ids beyond the embeddings would end a run in an index error, on a GPU in a failed assertion."""
    try:
        base = load_base_config(config.model_copy(update={"init": "random"}))  # reads the config, never the weights
    except UserError:  # a tokenizer alone is enough to look at data; whoever loads the model is told
        return
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= base.vocab_size:
        raise UserError(
            "model.tokenizer" if config.tokenizer else "model.path",
            f"the tokenizer's token {token!r} has id {largest}, and the model has {base.vocab_size} embeddings",
            f"ids up to {base.vocab_size - 1}",
            "name the model's own tokenizer, or add rows once: model.resize_token_embeddings(len(tokenizer))",
        )
