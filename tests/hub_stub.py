"""A hub on this machine that speaks as the real clients of Hugging Face and ModelScope expect, with faults on demand.

Both keep files as the real hubs do: the hub's own host answers with a redirect to the one that serves the bytes (here
the name `localhost` for 127.0.0.1), where the token must not follow. What was asked and sent is kept in `requests`.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_BLOCK = 1 << 16


@dataclass
class Request:
    """One request, and how many bytes of a file its reply carried."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent_bytes: int = 0


@dataclass
class Faults:
    """What goes wrong, until it is changed."""

    status: int | None = None  # of every reply of the hub's own host
    token: str | None = None  # without which the hub answers 401
    gated: bool = False  # 403, as for a licence that was not accepted
    cuts: list[int] = field(default_factory=list)  # each of the next transfers ends after so many bytes
    reset: bool = False  # a cut is a reset instead of an end
    wrong_byte: int | None = None  # this byte of every file is served wrong
    no_ranges: bool = False  # every reply is the whole file
    no_hash: bool = False  # no SHA-256 is published
    sha256: str | None = None  # published of every file by ModelScope, whatever its form
    size_bytes: int | None = None  # published of every file
    extra_bytes: int = 0  # sent after the end of every file
    pause_s: float = 0.0  # between two blocks of 64 KiB
    silent: bool = False  # nothing is answered at all


class HubStub:
    """Serves `files`, by repository and name, on a free port; to be used in a `with` block."""

    def __init__(self, files: Mapping[tuple[str, str], bytes]) -> None:
        self.files = dict(files)
        self.revisions = {"main": COMMIT}
        self.faults = Faults()
        self.requests: list[Request] = []
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "HubStub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def transfers(self) -> list[Request]:
        """The requests that bytes of files were asked with."""
        return [one for one in self.requests if one.method == "GET" and one.path.startswith("/cdn/")]

    @property
    def sent_bytes(self) -> int:
        """How many bytes of files were sent in all."""
        return sum(one.sent_bytes for one in self.requests)

    def wait(self, seconds: float) -> None:
        self._closing.wait(seconds)


class _Server(ThreadingHTTPServer):
    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the polite end that would come before a reset


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if match := re.search(r"m_session_id=([^;]+)", self.headers.get("Cookie") or ""):
            token = token or match[1]
        self.request_ = Request(self.command, self.path, self.headers.get("Range"), token)
        self.hub.requests.append(self.request_)
        faults = self.hub.faults
        if faults.silent:
            self.hub.wait(60)
            self.close_connection = True
            return
        url = urlsplit(self.path)
        if url.path.startswith("/cdn/"):
            self._serve_bytes(unquote(url.path.removeprefix("/cdn/")))
        elif faults.status is not None:
            self._reply(faults.status)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._huggingface(match[1], unquote(match[2]), unquote(match[3]))
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", url.path):
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self._modelscope(match[1], query, listing=match[2] is not None)
        else:
            self._reply(404)

    def _huggingface(self, repository: str, revision: str, name: str) -> None:
        faults = self.hub.faults
        if faults.gated:
            self._reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
        elif not any(known == repository for known, _ in self.hub.files):
            # So the real hub answers who shows no token: a private repository is not to be told from none.
            self._reply(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
        elif faults.token is not None and self.request_.token != faults.token:
            self._reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif (commit := self.hub.revisions.get(revision, revision)) not in self.hub.revisions.values():
            self._reply(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif (repository, name) not in self.hub.files:
            self._reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            content = self.hub.files[repository, name]
            etag = hashlib.sha1(content).hexdigest() if faults.no_hash else hashlib.sha256(content).hexdigest()
            self._redirect(
                repository,
                name,
                {
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{etag}"',
                    "X-Linked-Size": str(faults.size_bytes or len(content)),
                },
            )

    def _modelscope(self, repository: str, query: Mapping[str, str], *, listing: bool) -> None:
        faults = self.hub.faults
        name = query.get("FilePath", "")
        if faults.gated or (faults.token is not None and self.request_.token != faults.token):
            self._json(403 if faults.gated else 401, {"Code": 10010205001, "Message": "no access"})
        elif query.get("Revision", "master") != "master" or not any(known == repository for known, _ in self.hub.files):
            self._json(404, {"Code": 10010205001, "Message": "record not found"})
        elif listing:
            entries = [
                {"Path": path, "Name": path, "Type": "blob", "Size": faults.size_bytes or len(content)}
                | ({} if faults.no_hash else {"Sha256": faults.sha256 or hashlib.sha256(content).hexdigest()})
                for (known, path), content in self.hub.files.items()
                if known == repository
            ]
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": entries}})
        elif (repository, name) not in self.hub.files:
            self._json(404, {"Code": 10010205001, "Message": "file not found"})
        else:
            self._redirect(repository, name, {})

    def _redirect(self, repository: str, name: str, headers: Mapping[str, str]) -> None:
        place = f"http://localhost:{self.hub.port}/cdn/{quote(repository)}/{quote(name)}?signature=x"
        self._reply(302, {**headers, "Location": place})

    def _serve_bytes(self, place: str) -> None:
        owner, repository, name = place.split("/", 2)
        faults = self.hub.faults
        content = bytearray(self.hub.files[f"{owner}/{repository}", name])
        if faults.wrong_byte is not None:
            content[faults.wrong_byte] ^= 1
        start, end, status = 0, len(content), 200
        if (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range or "")) and not faults.no_ranges:
            start, end, status = int(match[1]), int(match[2] or len(content) - 1) + 1, 206
            if start >= len(content):
                self._reply(416, {"Content-Range": f"bytes */{len(content)}"})
                return
        if faults.extra_bytes:
            content += bytes(faults.extra_bytes)
            end = len(content)
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send(content, start, end)

    def _send(self, content: bytearray, start: int, end: int) -> None:
        faults = self.hub.faults
        stop = min(end, start + faults.cuts.pop(0)) if faults.cuts else end
        try:
            for position in range(start, stop, _BLOCK):
                block = content[position : min(position + _BLOCK, stop)]
                self.wfile.write(block)
                self.request_.sent_bytes += len(block)
                if faults.pause_s:
                    time.sleep(faults.pause_s)
        except OSError:  # the client was killed, which is what some tests are about
            self.close_connection = True
            return
        if stop < end:
            self.close_connection = True
            if faults.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _json(self, status: int, value: Mapping[str, Any]) -> None:
        self._reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _reply(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
