"""`packtrain push`: an adapter or a model to the Hub, with its card, in one commit that is compared afterwards."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import PacktrainError, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from trainer.checkpoint.result import Result

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD, ADAPTER_CONFIG = "README.md", "adapter_config.json"
# Nothing else goes: what a model is loaded with, and its card. Manifests name places of this machine.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG)
PUSHED = (
    *WEIGHTS,
    CARD,
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[A-Z0-9]{16}\b")
READ_BYTES = 2**24


@dataclass(frozen=True)
class PushedFile:
    """A file on its way.

    Attributes:
        path: its name in the repository.
        source: where its bytes are: a file, or the bytes themselves.
        size: in bytes. sha256: in hex; what the Hub knows large files by.
        blob: git's hash in hex; what the Hub knows small files by.
    """

    path: str
    source: Path | bytes
    size: int
    sha256: str
    blob: str


def push(folder: Path, *, repo: str, base: str | None = None, public: bool = False, dry_run: bool = False) -> None:
    """Send an adapter, a merged model or a full fine-tune to the Hugging Face Hub, with its card, in one commit.

    Of a run dir: its merged model where there is one, else its model or adapter. The token is the environment's
    (HF_TOKEN) or the one `hf auth login` keeps. Weights that the repository has of an earlier push and this one lacks
    are removed in the same commit.

    Args:
        folder: run dir, adapter folder or model folder.
        repo: OWNER/NAME; made where it does not exist.
        base: the base's id on the hub, where the training named a folder.
        public: let everybody see a repository that is made now.
        dry_run: list what would go, with sizes and hashes; no network is used.
    """
    from trainer.checkpoint.result import find_finished

    for option, given in {"--repo": repo, "--base": base}.items():
        if given is not None and not REPO.fullmatch(given):
            raise UserError(option, f"found {given!r}", "OWNER/NAME")
    result = find_finished(folder)
    if result.kind == "adapter":
        from trainer.model.adapter_files import check_adapter_config

        check_adapter_config(result.folder, result.adapter_recipe)
    files = list(_collect(result, base))
    _check_secrets(files)
    _print_files(files)
    if dry_run:
        print(f"would go to {repo}, {'public' if public else 'private'} where it is made; nothing was sent")
        return
    print(_send(files, repo, public))


def _collect(result: Result, base: str | None) -> Iterator[PushedFile]:
    """What goes, by name; the base's id is put where files name a folder of this machine."""
    folder = result.folder
    if not (folder / CARD).is_file():
        yield _describe(CARD, _card(result, base))
    for path in sorted({path for pattern in PUSHED for path in folder.glob(pattern) if path.is_file()}):
        if path.name == ADAPTER_CONFIG:
            yield _describe(path.name, _with_base(path, base))
        elif path.name == CARD and base:
            yield _describe(CARD, _card_with_base(path.read_text(encoding="utf-8"), base, result.kind))
        else:
            yield _describe(path.name, path)


def _card(result: Result, base: str | None) -> bytes:
    """A card for what has none, such as an adapter that PEFT wrote."""
    from trainer.checkpoint.result import training_of
    from trainer.export.card import build_card

    recipe = result.config.model_dump(mode="json") if result.config else None
    record = {"recipe": recipe, **training_of(result), "kind": result.kind}
    text = build_card(result.folder.resolve().name, record, result.run_dir)
    return _card_with_base(text, base, result.kind) if base else text.encode()


def _card_with_base(text: str, base: str, kind: str) -> bytes:
    """The card with `base` in its metadata, where it names none."""
    metadata = f"base_model: {base}\nbase_model_relation: {'adapter' if kind == 'adapter' else 'finetune'}\n"
    names_one = re.search(r"^base_model:", text, re.MULTILINE)
    return (text if names_one else text.replace("---\n", f"---\n{metadata}", 1)).encode()


def _with_base(file: Path, base: str | None) -> bytes:
    """PEFT's config, naming a base that others can have.

    Raises:
        UserError: it names a folder of this machine.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    named = config.get("base_model_name_or_path") or ""
    if base:
        config["base_model_name_or_path"] = base
    elif not REPO.fullmatch(named) or Path(named).exists():
        found = f"base_model_name_or_path is {named!r}, a folder of this machine: nobody could load the adapter"
        raise UserError(str(file), found, "the base's id on the hub", "--base OWNER/NAME, or push the merged model")
    return (json.dumps(config, indent=2) + "\n").encode()


def _describe(name: str, source: Path | bytes) -> PushedFile:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            sha256.update(chunk)
            blob.update(chunk)
    return PushedFile(name, source, size, sha256.hexdigest(), blob.hexdigest())


def _check_secrets(files: Sequence[PushedFile]) -> None:
    for file in files:
        if file.path not in (CARD, ADAPTER_CONFIG, "config.json", "generation_config.json", "tokenizer_config.json"):
            continue
        text = (file.source if isinstance(file.source, bytes) else file.source.read_bytes()).decode(errors="replace")
        if found := SECRETS.search(text):
            shown = found[0][:6] + "..."
            raise UserError(file.path, f"has {shown}, which looks like a secret", "none", "remove it from the file")


def _print_files(files: Sequence[PushedFile]) -> None:
    for file in files:
        print(f"{file.size:>15,}  sha256 {file.sha256}  {file.path}")
    print(f"{sum(file.size for file in files):>15,}  bytes in {len(files)} files")


def _send(files: Sequence[PushedFile], repo: str, public: bool) -> str:
    """Commits and compares; gives the commit's address.

    Raises:
        UserError: there is no token, the Hub refuses it, or the repository is public and was not to be.
        PacktrainError: the Hub cannot be reached, or has other bytes afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        fix = "`hf auth login`, or export HF_TOKEN=hf_... of an account that may write there"
        raise UserError("HF_TOKEN", f"no token to write to {repo} with: not set, and none is kept", fix=fix)
    api = HfApi()
    try:
        old = _prepare_repo(api, repo, public)
        sources = [file.source if isinstance(file.source, bytes) else str(file.source) for file in files]
        added = [CommitOperationAdd(file.path, source) for file, source in zip(files, sources, strict=True)]
        stale = [CommitOperationDelete(path) for path in sorted(old - {file.path for file in files})]
        commit = api.create_commit(repo, [*added, *stale], commit_message=f"Upload by packtrain: {len(files)} files")
        _compare(api, repo, commit.oid, files)
    except PacktrainError:
        raise
    except Exception as error:  # also those of whichever HTTP library the Hub's client stands on
        raise _explain(repo, error) from error
    return f"{commit.commit_url}\n{len(files)} files are there with the same sizes and hashes: {api.endpoint}/{repo}"


def _explain(repo: str, error: Exception) -> PacktrainError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if 400 <= status < 500 or isinstance(error, ValueError):
        fix = "`hf auth login`, or HF_TOKEN with the right to write there; see what the Hub says"
        return UserError("--repo", f"the Hub does not take {repo}: {said}", fix=fix)
    return PacktrainError(f"{repo}: the Hub was not reached, or failed: {said}\n  fix: try again; HF_HUB_OFFLINE unset")


def _prepare_repo(api: HfApi, repo: str, public: bool) -> set[str]:
    """Makes the repository where there is none; gives the files of weights that lie in it.

    Raises:
        UserError: it is public, and was not to be.
    """
    from fnmatch import fnmatch

    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info: Any = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
        return set()
    if not info.private and not public:
        raise UserError("--repo", f"{repo} is there and public", "a private one", "name another, or give --public")
    names = [sibling.rfilename for sibling in info.siblings or []]
    return {name for name in names if any(fnmatch(name, pattern) for pattern in WEIGHTS) and "/" not in name}


def _compare(api: HfApi, repo: str, revision: str, files: Sequence[PushedFile]) -> None:
    """Raises `PacktrainError` where the Hub has other files than were sent."""
    found = {info.path: info for info in api.get_paths_info(repo, [file.path for file in files], revision=revision)}
    wrong = [file.path for file in files if not _is_same(file, found.get(file.path))]
    if wrong:
        raise PacktrainError(
            f"{repo} at {revision}: {len(wrong)} of {len(files)} files are not there as sent, first {wrong[0]}\n"
            "  fix: push again; until then do not use this commit"
        )


def _is_same(file: PushedFile, info: Any) -> bool:
    if info is None or info.size != file.size:
        return False
    return info.lfs.sha256 == file.sha256 if info.lfs else info.blob_id == file.blob
