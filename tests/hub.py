"""A model hub on loopback that speaks the routes that huggingface_hub asks, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EMBEDDED = Path(__file__).parents[1] / "deployments" / "embedded"
FILES = {
    "tokenizer.json": (EMBEDDED / "tokenizer.json").read_bytes(),
    "tokenizer_config.json": b'{"bos_token": "<s>", "chat_template": "old"}',
    "chat_template.jinja": b"new {{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": b"tools {{ messages[0].content }}",
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "modeling.py": b"code",
}
MODEL = "some-org/some-model"


def write_folder(path: Path, files: dict[str, bytes] = FILES) -> Path:
    """Write a model's files into a folder; returns it."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


class Hub:
    """Serves models from memory; used as a context manager.

    Attributes:
        models: Model name -> file name -> content.
        asked: How often each path was asked for.
        tokens: Authorization headers that came in.
        trouble: File name, or "api" for the listing -> what goes wrong: a status, "slow",
            "cut" (fewer bytes than promised) or "hang up".
    """

    def __init__(self, models: dict[str, dict[str, bytes]]) -> None:
        self.models = models
        self.asked: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        self.trouble: dict[str, int | str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.released = threading.Event()
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        """The endpoint, as in HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_request(self, code: Any = None, size: Any = None) -> None:
                pass

            def do_HEAD(self) -> None:
                self._serve()

            def do_GET(self) -> None:
                self._serve()

            def _serve(self) -> None:
                path = self.path.split("?")[0]
                hub.asked[f"{self.command} {path}"] += 1
                hub.tokens.add(self.headers.get("Authorization"))
                if path.startswith("/api/models/"):
                    name, _, _ = path.removeprefix("/api/models/").partition("/revision/")
                    self._answer("api", hub.listing(name), {})
                    return
                name, _, rest = path.lstrip("/").partition("/resolve/")
                file = rest.partition("/")[2]
                data = hub.models.get(name, {}).get(file)
                # The same whatever is sent: damage happens on the way.
                etag = hashlib.sha256(path.encode()).hexdigest()
                self._answer(file, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

            def _answer(self, what: str, data: bytes | None, headers: dict[str, str]) -> None:
                trouble = hub.trouble.get(what)
                if trouble == "slow":
                    hub.released.wait(30)
                if trouble == "hang up":
                    self.close_connection = True
                elif isinstance(trouble, int) or data is None:
                    self._refuse(trouble if isinstance(trouble, int) else 404)
                else:
                    self._send(data, headers, is_cut=trouble == "cut")

            def _send(self, data: bytes, headers: dict[str, str], *, is_cut: bool) -> None:
                self.send_response(200)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data[: len(data) // 2] if is_cut else data)
                    self.close_connection = is_cut

            def _refuse(self, status: int) -> None:
                self.send_response(status)
                code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler

    def listing(self, name: str) -> bytes | None:
        """Return what the API says of a model, None for one that it does not know."""
        if name not in self.models:
            return None
        siblings = [{"rfilename": file} for file in self.models[name]]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
