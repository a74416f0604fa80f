"""`packtrain serve`: vLLM's OpenAI server for what was trained, with what its run knows, and one prompt to prove it."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from trainer.errors import PacktrainError, UserError

PROMPT = "Why do llamas hum?"
KEYS = ("PACKTRAIN_API_KEY", "VLLM_API_KEY")  # the first that is set counts; vLLM reads the second
OWN_OPTIONS = {  # of vLLM's: what sets each here
    "--api-key": f"the environment variable {KEYS[0]}",
    "--enable-lora": "the folder",
    "--host": "--host",
    "--lora-modules": "--name and the folder",
    "--max-model-len": "--max-length",
    "--model": "the folder",
    "--port": "--port",
    "--served-model-name": "--name",
    "--tensor-parallel-size": "--gpus",
    "-tp": "--gpus",
}
SECONDS_TO_ANSWER = 300.0  # the first request may compile kernels
SECONDS_TO_POLL = 2.0
NEW_TOKENS = 16
# Never through a proxy: the server is this machine's.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

logger = logging.getLogger(__name__)


def serve(
    folder: Path,
    *vllm_options: str,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Number(gte=1, lte=65535))] = 8000,
    gpus: int | None = None,
    name: str | None = None,
    max_length: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    wait: Annotated[float, Parameter(validator=Number(gt=0))] = 1800.0,
    print_only: Annotated[bool, Parameter(name="--print")] = False,
) -> None:
    """Start vLLM's OpenAI server for a trained model, see that it answers, and stay until Ctrl-C.

    Of a run dir: its merged model, its full fine-tune, or its LoRA adapter on the base. An API key is taken from the
    environment variable PACKTRAIN_API_KEY.

    Args:
        folder: run dir, merged or plain model, or adapter folder, which is served unmerged on its base.
        vllm_options: after --, options of `vllm serve` that are passed on.
        host: address to listen on; one that other machines reach needs an API key.
        port: port to listen on.
        gpus: GPUs to cut the model over; default: all visible ones that its heads divide by.
        name: the model's name in requests; default: the run's or the folder's. An adapter's base is NAME-base.
        max_length: longest prompt and answer together, in tokens; default: what the model's config says. The recipe's
            pack_length, the longest row trained on, is shown and does not limit it.
        wait: seconds until the server has to answer.
        print_only: print the command and start nothing.
    """
    from launch.serving import choose_num_gpus, serving_options
    from trainer.launchers import count_gpus
    from trainer.servable import describe_servable, is_built_for_cpus

    _check_passed_on(vllm_options)
    if name is not None and not name.strip():
        raise UserError(
            "--name", f"found {name!r}", "a name for requests", "leave it out for the run's or the folder's"
        )
    variable, key = _api_key(os.environ)
    _check_host(host, key)
    result = _find_served(folder)
    if name is None:
        name = (result.run_dir.path if result.run_dir else result.folder).resolve().name
    servable = describe_servable(result)
    if max_length and max_length > servable.longest:
        fix = "leave it out for all that the model has"
        raise UserError("--max-length", f"{max_length} tokens", f"at most the model's {servable.longest}", fix)
    num_gpus = choose_num_gpus(servable.shape, gpus, count_gpus(os.environ))
    command = ["vllm", "serve", servable.model, *serving_options(servable, name, max_length)]
    command += ["--tensor-parallel-size", str(num_gpus), "--host", host, "--port", str(port), *vllm_options]
    if print_only:
        print((f'VLLM_API_KEY="${variable}" ' if key and variable != KEYS[1] else "") + shlex.join(command))
        return
    command[0] = _find_vllm()
    request, prompt_ids = _known_prompt(servable.tokenizer_source, name)
    _check_port(host, port)
    if result.config:
        logger.info("rows of up to %d tokens were trained on", result.config.data.pack_length)
    if servable.adapter and is_built_for_cpus():  # vLLM 0.32, vllm/lora/ops/torch_ops: no adapter is index -1, the last
        logger.warning("on CPUs vLLM applies the adapter to %s-base too where requests for both share a batch", name)
    _run(command, _url(host, port), request, prompt_ids, variable, key, wait)


def _run(
    command: Sequence[str],
    url: str,
    request: dict[str, Any],
    prompt_ids: list[int],
    variable: str,
    key: str,
    seconds: float,
) -> None:
    from launch.local import received_signals
    from launch.server import Server

    environ = {**os.environ, **({KEYS[1]: key} if key else {})}
    logger.info("%s", shlex.join(command))
    with received_signals() as received, Server(command, environ, received, secret=key) as server:
        server.wait_until(lambda: _is_healthy(url), seconds)
        server.call(lambda: _check_answer(url, request, prompt_ids, key))
        print(f"serving {request['model']} at {url}/v1; it reads prompts as packtrain does. Ctrl-C ends it\n")
        print(_curl(url, request, variable if key else ""), flush=True)
        server.wait()


def _check_passed_on(options: Sequence[str]) -> None:
    if options and not options[0].startswith("-"):
        raise UserError("packtrain serve", f"found {options[0]}", "one folder", "give vLLM's own options after --")
    for name in (option.partition("=")[0] for option in options):
        if instead := OWN_OPTIONS.get(name.replace("_", "-")):
            raise UserError(name, "passed on to vLLM", "options that packtrain does not set", f"{instead} sets it")


def _api_key(environ: Mapping[str, str]) -> tuple[str, str]:
    """The variable that has the key, and the key; where there is none, the first variable and nothing."""
    return next(((name, environ[name]) for name in KEYS if environ.get(name)), (KEYS[0], ""))


def _check_host(host: str, key: str) -> None:
    if key or _is_loopback(host):
        return
    raise UserError(
        "--host",
        f"{host}, which other machines reach, without an API key",
        f"127.0.0.1, or a key in the environment variable {KEYS[0]}",
        f"export {KEYS[0]}=$(openssl rand -hex 32)",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _find_served(folder: Path) -> Any:
    """A `Result` that can be served as it was trained."""
    from trainer.checkpoint.result import find_finished, is_run

    result = find_finished(folder)
    if result.kind != "adapter" or result.config is None:
        return result
    if not (result.folder / "tokenizer_config.json").exists():
        fix = f"`packtrain merge {folder} --out DIR`, and serve DIR"
        raise UserError(str(result.folder), "a checkpoint's adapter, without tokenizer", "what a run ends with", fix)
    if quantization := result.config.quantization:
        trained_on = f"an adapter trained on the base in {quantization.type}"
        if is_run(folder):
            fix = f"`packtrain merge {folder}`; or name {result.folder} to serve it on the 16-bit base all the same"
            raise UserError(str(folder), f"{trained_on}, not merged", "a merged model", fix)
        logger.warning(
            "%s: %s answers otherwise on the base's own weights; `packtrain merge` keeps what was trained",
            result.folder,
            trained_on,
        )
    return result


def _find_vllm() -> str:
    """The `vllm` beside this Python, where no shell has activated its environment, or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if found := shutil.which("vllm", path=path):
        return found
    raise UserError(
        "packtrain serve",
        "vLLM is not installed here",
        fix="pip install -e '.[serve]' in packtrain's folder on a machine with GPUs, or vLLM's build for CPUs; "
        "--print shows the command",
    )


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError("--host", f"{host}: {error.strerror}", "an address of this machine") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
        except OSError as error:
            fix = "end what listens there, or choose another --port"
            raise UserError("--port", f"{port} on {host}: {error.strerror}", "a free port", fix) from error


def _known_prompt(tokenizer_source: Any, name: str) -> tuple[dict[str, Any], list[int]]:
    """A request for an answer, and the ids of its prompt as the training rendered it.

    A model without chat template is asked to go on with a text.
    """
    from trainer.data.masking import load_template
    from trainer.generate import prompt_token_ids
    from trainer.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_source)
    template = load_template("tokenizer", tokenizer)
    asked = {"prompt": PROMPT} if template.text is None else {"messages": [{"role": "user", "content": PROMPT}]}
    return {"model": name, **asked, "max_tokens": NEW_TOKENS}, prompt_token_ids(PROMPT, template, tokenizer)


def _url(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _endpoint(request: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in request else "/v1/completions"


def _is_healthy(url: str) -> bool:
    try:
        with _open(f"{url}/health", timeout=SECONDS_TO_POLL) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _check_answer(url: str, request: dict[str, Any], prompt_ids: list[int], key: str) -> None:
    """Asks once.

    Raises:
        PacktrainError: no answer comes, or the server reads the prompt as other tokens.
    """
    answer = _ask(url + _endpoint(request), {**request, "temperature": 0, "return_token_ids": True}, key)
    try:
        count, answered = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
        choice = answer["choices"][0]
        found = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    except (KeyError, IndexError, TypeError) as error:
        raise PacktrainError(f"{url}: no answer in what the server says: {str(answer)[:300]}") from error
    if not answered:
        raise PacktrainError(f"{url}: the server answers a prompt with no token at all: {str(answer)[:300]}")
    if count != len(prompt_ids) or (found and found != prompt_ids):
        raise PacktrainError(_say_difference(found, count, prompt_ids))


def _say_difference(found: list[int] | None, count: int, prompt_ids: list[int]) -> str:
    lines = [f"the server reads a prompt of {len(prompt_ids)} tokens as {count}: not as in training"]
    if found:
        lines.append(f"  the server: {found[:8]} ...\n  trained:    {prompt_ids[:8]} ...")
    twice = found[:2] == prompt_ids[:1] * 2 if found else count == len(prompt_ids) + 1
    fix = "leave --tokenizer and --chat-template to packtrain, which takes those trained with"
    lines.append(f"  fix: {'BOS may be there twice; ' if twice else ''}{fix}")
    return "\n".join(lines)


def _ask(url: str, request: dict[str, Any], key: str) -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        sent = urllib.request.Request(url, json.dumps(request).encode(), headers)
        with _open(sent, timeout=SECONDS_TO_ANSWER) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:500]
        raise PacktrainError(f"{url}: the server refuses a prompt with status {error.code}: {said}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PacktrainError(f"{url}: the server does not answer a prompt: {error}") from error


def _curl(url: str, request: dict[str, Any], variable: str) -> str:
    authorization = f' -H "Authorization: Bearer ${variable}"' if variable else ""
    body = shlex.quote(json.dumps(request))
    return f"curl {url}{_endpoint(request)}{authorization} -H 'Content-Type: application/json' -d {body}"
