"""A stand-in for `vllm serve`: started with its options, it answers as vLLM does, or fails in the way FAKE_VLLM names.

It notes its arguments, its key, itself and a child of its own in the folder FAKE_VLLM_NOTES.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODE = os.environ.get("FAKE_VLLM", "well")
NOTES = Path(os.environ["FAKE_VLLM_NOTES"])
PROMPT_IDS = json.loads(os.environ["FAKE_VLLM_PROMPT_IDS"])
KEY = os.environ.get("VLLM_API_KEY", "")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(503 if MODE == "never healthy" else 200, None)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if KEY and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._send(401, {"error": "Unauthorized"})
            return
        if MODE == "dies when asked":
            print("CUDA error: an illegal memory access", flush=True)
            os._exit(7)
        (NOTES / "request.json").write_text(json.dumps({"path": self.path, **request}))
        ids = PROMPT_IDS[:1] * MODE.startswith("double") + PROMPT_IDS
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        told = {} if MODE.endswith("without ids") else {"prompt_token_ids": ids}
        choice = {"index": 0, "message": {"role": "assistant", "content": "La"}, "finish_reason": "stop"}
        self._send(200, {"choices": [choice], "usage": usage, **told})

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: Any) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    if MODE == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    record = {"arguments": sys.argv[1:], "key": KEY, "pids": [os.getpid(), child.pid]}
    (NOTES / "started.json").write_text(json.dumps(record))
    print(f"loading; the key is {KEY}", flush=True)
    if MODE == "dies at start":
        why = "(Worker pid=7) ERROR 11-21 23:28:00 [worker.py:95] ValueError: No available memory for the cache blocks"
        print(why, *["  in a frame"] * 20, "RuntimeError: see root cause above", sep="\n", file=sys.stderr, flush=True)
        sys.exit(3)
    options = dict(zip(sys.argv[:-1], sys.argv[1:], strict=True))
    server = ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler)
    if MODE != "hangs":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # and leaves its child behind
    time.sleep(0.2)
    server.serve_forever()


main()
