"""`evaluate serve`: the pages of a run with a server behind them, for what pages from the disk cannot do."""

from __future__ import annotations

import contextlib
import getpass
import platform
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from matryoshka.checkpoints import find_checkpoint
from matryoshka.errors import UserError

from ..analyses.samples.files import SamplesMetadata
from ..analysis import Progress
from ..config import EvaluateConfig
from ..rows.token_text import token_text, visible
from .build import REPORT_FOLDER, largest_acts, make_report, near_place, read_pages_metadata, samples_folder
from .http_pages import HOST, PageApi, PageServer, PortTaken
from .live_text import Change, LiveText, enough_memory
from .notes import Notes
from .page_set import LIVE_PAGES, asset_files, index_html
from .window_search import Found, WindowIndex

FIRST_PORT = 8765
_PORTS = 100
"""So many are tried, from FIRST_PORT on."""
_STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class ReportServer:
    """A server that listens."""

    server: PageServer
    name: str
    notes: tuple[str, ...] = ()
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held while the language model works."""

    @property
    def address(self) -> str:
        """What to open."""
        host, port = self.server.server_address[:2]
        return f"http://{host}:{port}/"

    @property
    def tunnel(self) -> str:
        """What to type on another machine, so that its browser reaches this server under the same address."""
        port, user = self.server.port, ""
        # A container's user may have no name; ssh then takes the one of the other side.
        with contextlib.suppress(KeyError, OSError):
            user = f"{getpass.getuser()}@"
        return f"ssh -N -L {port}:{HOST}:{port} {user}{platform.node()}"

    def run(self, say: Callable[[str], Any]) -> None:
        """Answer until Ctrl-C or SIGTERM, which are the ordinary ends. In the main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # Set here, because a shell starts what runs in the background with SIGINT ignored.
            signal.signal(number, signal.default_int_handler)
        for note in self.notes:
            say(note)
        say(f"{self.name}: {self.address} (Ctrl-C ends it)")
        say(f"from another machine: {self.tunnel}, then open the same address there")
        try:
            self.server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
        finally:
            self.server.server_close()
            # A forward pass that is under way would be torn down with the interpreter in the middle of it.
            self.busy.acquire(timeout=_STOP_SECONDS)


def serve_report(
    run: Path,
    config: EvaluateConfig,
    *,
    port: int | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> ReportServer:
    """Listen on 127.0.0.1 with the pages of `run`; they are made first where there are none of its newest weights.

    Without a `port` it is FIRST_PORT or the next one that is free, so that addresses and tunnels stay the same from day
    to day. The language model is loaded when the first text is tried. Raises UserError for invalid input.
    """
    notes: list[str] = []
    folder = _pages(run, config)
    if folder is None:
        pages = make_report(run, config, tokenizer=tokenizer, progress=progress)
        folder = pages.index.parent
    samples, checkpoint = samples_folder(run, config), find_checkpoint(run)
    metadata = SamplesMetadata.read(samples.parent)
    assert metadata is not None
    near = near_place(config, samples)
    text = token_text(metadata.tokenizer, metadata.shard_set.model_revision, near, tokenizer, notes.append)
    text_of = cache(lambda token: visible(text(token)))
    lock = threading.Lock()
    live = LiveText(checkpoint, metadata.transcoder, config, cache(lambda: largest_acts(samples.parent)))

    def try_text(typed: str) -> dict[str, Any]:
        with lock, enough_memory():
            return live.tokens(typed)

    def change(asked: Change) -> dict[str, Any]:
        with lock, enough_memory():
            return live.changed(asked)

    index_lock, windows = threading.Lock(), cache(lambda: WindowIndex.read(samples, text_of))

    def search(query: str, where: str) -> Found:
        with index_lock:
            index = windows()
        return index.find(query, where)

    api = PageApi(
        index=index_html(checkpoint.name, LIVE_PAGES, live=True),
        folder=folder,
        search=search,
        try_text=try_text,
        change=change,
        notes=Notes(checkpoint.run, sum(metadata.transcoder.config["group_sizes"])),
        assets=asset_files(),
    )
    return ReportServer(_listening(api, port), checkpoint.name, tuple(notes), lock)


def _listening(api: PageApi, port: int | None) -> PageServer:
    if port is not None:
        return PageServer(api, port)
    for tried in range(FIRST_PORT, FIRST_PORT + _PORTS):
        with contextlib.suppress(PortTaken):
            return PageServer(api, tried)
    raise UserError(
        f"the ports {FIRST_PORT} to {FIRST_PORT + _PORTS - 1} of {HOST} are all taken; end an older server, or choose "
        "another port with --port (0 is any that is free)"
    )


def _pages(run: Path, config: EvaluateConfig) -> Path | None:
    """The folder of pages that belongs to the samples of `run`; None when it has to be made."""
    try:
        samples = samples_folder(run, config)
    except UserError:
        return None
    metadata, pages = SamplesMetadata.read(samples.parent), read_pages_metadata(samples.parent / REPORT_FOLDER)
    if metadata is None or pages is None or pages.transcoder.sha256 != metadata.transcoder.sha256:
        return None
    return samples.parent / REPORT_FOLDER
