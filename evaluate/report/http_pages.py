"""The HTTP server behind `evaluate serve`, for one person on 127.0.0.1: a folder, a search, texts to try, and notes.

Of the standard library, and not a framework: a few questions and a folder need nothing that would have to be installed,
and http.server warns only of being put on a network, which this never is. What a local server has to fear are the
other pages in the same browser: they cannot name it (Host is checked, against DNS rebinding), nor make it work
(Origin and Sec-Fetch-Site are checked), nor load its files as scripts (Cross-Origin-Resource-Policy).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from matryoshka.config import Config
from matryoshka.errors import UserError

from .live_text import Change
from .notes import NewNote, NoteChanged, Notes
from .window_search import FIRES, Found

HOST = "127.0.0.1"
MAX_BODY = 64 * 1024
"""Bytes of a request's body."""
SOCKET_SECONDS = 30.0
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
}
_Asked = TypeVar("_Asked", bound=Config)
_OWN_PAGES = (None, "same-origin", "none")
"""Sec-Fetch-Site of our own pages and of an address typed in; None: a client that is no browser."""


@dataclass(frozen=True, slots=True)
class PageApi:
    """What the server answers with."""

    index: str
    """The page at /."""
    folder: Path
    """Its files are served, and nothing else of the disk."""
    assets: Mapping[str, bytes]
    """Served below /assets, in place of those in the folder."""
    search: Callable[[str, str], Found]
    """Latents that fire on words or have them in their windows: (words, which of the two)."""
    try_text: Callable[[str], dict[str, Any]]
    """The top latents of each token of a text. One call at a time."""
    change: Callable[[Change], dict[str, Any]]
    """How the model continues a text with a latent changed. One call at a time."""
    notes: Notes
    """Own notes and stars."""


class PortTaken(UserError):
    """A port that cannot be listened on."""


class PageServer(ThreadingHTTPServer):
    """Listens as soon as it is made; `serve_forever` answers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, api: PageApi, port: int = 0) -> None:
        """Port 0 is any that is free. Raises PortTaken when it is not available."""
        self.api = api
        # Looked up, never joined to the folder: an address cannot lead out of it.
        self.files = {
            f"/{path.relative_to(api.folder).as_posix()}": path
            for path in sorted(api.folder.rglob("*"))
            if path.is_file()
        }
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise PortTaken(
                f"port {port} of {HOST} is not available ({error.strerror}); choose another, or 0"
            ) from error

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server_address[1]

    @property
    def hosts(self) -> frozenset[str]:
        """Names that a browser may know it by."""
        names = (HOST, "localhost")
        # A browser leaves the default port out.
        return frozenset(f"{name}:{self.port}" for name in names) | frozenset(names if self.port == 80 else ())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is nothing to tell of."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _TryText(Config):
    """What a page asks: the latents of a text."""

    text: str


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0: each connection ends with its answer, so that none is open when the server stops.
    timeout = SOCKET_SECONDS
    server_version = "matryoshka"
    sys_version = ""

    @property
    def pages(self) -> PageServer:
        assert isinstance(self.server, PageServer)
        return self.server

    def do_GET(self) -> None:  # noqa: N802 -- the name is http.server's
        self._answer(self._get)

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the person, and addresses hold what was searched for."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """In plain text, with our headers; `explain` is left out."""
        self._send(HTTPStatus(code), "text/plain; charset=utf-8", (message or HTTPStatus(code).phrase).encode())

    def _answer(self, method: Callable[[], tuple[str, bytes]]) -> None:
        try:
            if self.headers.get("Host") not in self.pages.hosts:
                raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to its own address only")
            kind, body = method()
        except _Refused as refused:
            self._send(refused.status, "application/json", _json({"error": str(refused)}))
        except NoteChanged as changed:
            body = _json({"error": str(changed), "note": changed.note.model_dump(mode="json")})
            self._send(HTTPStatus.CONFLICT, "application/json", body)
        except UserError as error:
            self._send(HTTPStatus.BAD_REQUEST, "application/json", _json({"error": str(error)}))
        else:
            self._send(HTTPStatus.OK, kind, body)

    def _get(self) -> tuple[str, bytes]:
        address = urlsplit(self.path)
        if address.path in ("/", "/index.html"):
            return _TYPES[".html"], self.pages.api.index.encode()
        if address.path == "/api/search":
            self._require_own_page()
            asked = parse_qs(address.query)
            found = self.pages.api.search(asked.get("q", [""])[0], asked.get("in", [FIRES])[0])
            return "application/json", _json({"latents": found.latents, "shares": found.shares})
        if address.path == "/api/notes":
            self._require_own_page()
            return "application/json", _json({"notes": self.pages.api.notes.shown()})
        folder, _, name = address.path.rpartition("/")
        if folder == "/assets" and name in self.pages.api.assets:
            return _kind(name), self.pages.api.assets[name]
        path = self.pages.files.get(address.path)
        if path is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            return _kind(path.name), path.read_bytes()
        except OSError as error:
            raise _Refused(
                HTTPStatus.GONE, f"{path.name} is gone; the pages were made again: stop the server and start it again"
            ) from error

    def _post(self) -> tuple[str, bytes]:
        api = self.pages.api
        match urlsplit(self.path).path:
            case "/api/try":
                found = api.try_text(self._asked(_TryText, '{"text": "..."}').text)
            case "/api/change":
                example = '{"latent": 17, "text": "...", "how": "steer", "strength": 2}'
                found = api.change(self._asked(Change, example))
            case "/api/note":
                example = '{"latent": 17, "star": true, "text": "...", "changes": 0}'
                found = api.notes.keep(self._asked(NewNote, example)).model_dump(mode="json")
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        return "application/json", _json(found)

    def _asked(self, kind: type[_Asked], example: str) -> _Asked:
        """The body of a request of one of our own pages."""
        self._require_own_page()
        origin = self.headers.get("Origin")
        if origin not in {f"http://{host}" for host in self.pages.hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "only the pages of this server may ask it")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a JSON object is expected")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the body is expected")
        if int(length) > MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a text may have {MAX_BODY:,} bytes at most")
        try:
            content = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body is not JSON") from error
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            (*_, where), why = error.errors()[0]["loc"] or ("it",), error.errors()[0]["msg"]
            raise _Refused(
                HTTPStatus.BAD_REQUEST, f"an object such as {example} is expected; {where}: {why}"
            ) from error

    def _require_own_page(self) -> None:
        if self.headers.get("Sec-Fetch-Site") not in _OWN_PAGES:
            raise _Refused(HTTPStatus.FORBIDDEN, "only the pages of this server may ask it")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _json(content: object) -> bytes:
    return json.dumps(content, allow_nan=False, ensure_ascii=True).encode()


def _kind(name: str) -> str:
    return _TYPES.get(Path(name).suffix, "text/plain; charset=utf-8")
