"""One writer at a time in an object store, which knows no locks that vanish with their process.

A writer puts manifest/.lock there (a PUT that fails if it exists) and puts it again every few seconds. Who finds a lock
watches it: one that changes belongs to a living process, and one that does not is taken over, in a PUT that fails when
somebody else was faster. No clocks are compared. Whoever lost its lock stops before its next commit.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.runs import json_bytes
from matryoshka.shards.manifest import MANIFEST_FOLDER

logger = logging.getLogger(__name__)

LOCK = f"{MANIFEST_FOLDER}/.lock"
BEAT_SECONDS = 15.0
"""How often a living writer puts its lock again."""
WATCH_SECONDS = 60.0
"""How long a lock has to stay the same before it is taken over."""


Explained = Callable[[], AbstractContextManager[None]]
"""A context that turns what obstore raises into a UserError."""


@contextmanager
def lease(client: Any, where: str, explained: Explained) -> Iterator[Callable[[], None]]:
    """Hold the storage behind an obstore `client` for this process; raises UserError when a living process has it.

    Gives what to call before each commit: it raises UserError when the lock was taken over. `where`: for messages.
    """
    held = _Lease(client, where, explained)
    held.take()
    held.start()
    try:
        yield held.check
    finally:
        held.stop()


class _Lease:
    def __init__(self, client: Any, where: str, explained: Explained) -> None:
        self._client, self._where, self._explained = client, where, explained
        self._name = uuid.uuid4().hex
        self._n_beats = 0
        self._tag: dict[str, Any] = {}
        self._conditional = True
        self._lost = False
        self._renewed = time.time()
        self._renewing = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> None:
        """Put the lock, or take over one that nobody keeps alive."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        for last in (False, True):
            # Looked at first: a store without conditional PUTs would let us write over a living lock.
            tag = self._watched()
            try:
                self._put("create" if tag is None else tag)
                return
            except (AlreadyExistsError, PreconditionError) as error:
                # Somebody was faster, or the answer to our own PUT was lost and it was sent again.
                if last:
                    raise _taken(self._where, None) from error

    def start(self) -> None:
        """Begin to keep it alive."""
        self._thread.start()

    def stop(self) -> None:
        """Give it back."""
        self._end.set()
        self._thread.join()
        now = None if self._lost else self._seen()
        if now is not None and now[0].get("name") == self._name:
            self._delete()

    def _delete(self) -> None:
        import obstore

        with self._explained(), suppress(FileNotFoundError):
            obstore.delete(self._client, LOCK)

    def check(self) -> None:
        """Raise UserError when somebody has taken the lock over."""
        # Suspended or cut off for long, this process may be asked before the next beat.
        if time.time() - self._renewed > WATCH_SECONDS / 2:
            self._renew()
        if self._lost:
            raise UserError(
                f"{self._where} was taken over by another process, because this one did not show itself for "
                f"{WATCH_SECONDS:.0f} s (was it suspended, or the network gone?). Stop one of the two; what is "
                "committed stays"
            )

    def _put(self, mode: Any) -> None:
        import obstore
        from obstore.exceptions import NotSupportedError

        content = json_bytes({**_owner(), "name": self._name, "beat": self._n_beats})
        self._n_beats += 1
        with self._explained():
            try:
                found: Any = obstore.put(self._client, LOCK, content, mode=mode)
            except (NotSupportedError, NotImplementedError):
                # A store without conditional PUTs: the watching is all there is.
                self._conditional = False
                found = obstore.put(self._client, LOCK, content)
        self._tag = _tag(found)

    def _watched(self) -> dict[str, Any] | None:
        """The tag of a lock that is not alive, or None when it has gone; raises UserError when it is alive."""
        first = self._seen()
        if first is None:
            return None
        owner, tag = first
        if owner.get("name") == self._name:
            return tag  # our own: the answer to the first PUT was lost, and it was sent again
        if _is_gone(owner):
            return tag
        logger.warning(
            "%s is locked by process %s on %s: watching for %.0f s whether that one still works",
            *(self._where, owner.get("pid"), owner.get("host"), WATCH_SECONDS),
        )
        watched = 0.0
        while watched < WATCH_SECONDS:
            step = min(BEAT_SECONDS / 3, WATCH_SECONDS - watched)
            self._end.wait(step)
            watched += step
            now = self._seen()
            if now is None:
                return None
            if now[1] != tag:
                raise _taken(self._where, now[0])
        return tag

    def _seen(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The owner that the lock names, and the tag of its content."""
        import obstore

        try:
            with self._explained():
                found: Any = obstore.get(self._client, LOCK)
                content = bytes(found.bytes())
        except FileNotFoundError:
            return None
        try:
            owner = json.loads(content)
        except ValueError:
            owner = {}
        return owner if isinstance(owner, dict) else {}, _tag(found.meta)

    def _beat(self) -> None:
        from obstore.exceptions import BaseError

        while not self._lost and not self._end.wait(BEAT_SECONDS):
            try:
                self._renew()
            except (UserError, BaseError) as error:
                logger.warning("the lock of %s could not be renewed: %s", self._where, error)

    def _renew(self) -> None:
        """Put the lock again, or find that it is lost."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._renewing:
            if self._conditional:
                try:
                    self._put(self._tag)
                    self._renewed = time.time()
                    return
                except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                    pass  # ours still, if a PUT was sent twice because the first answer was lost
            now = self._seen()
            if now is None or now[0].get("name") != self._name:
                self._lost = True
                return
            self._tag = now[1]
            if not self._conditional:
                self._put(self._tag)
            self._renewed = time.time()


def _tag(found: Any) -> dict[str, Any]:
    """What names one content of an object, as obstore takes it for a conditional PUT."""
    return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this very machine, and has ended."""
    here = _owner()
    if here["boot"] is None or any(owner.get(name) != here[name] for name in ("host", "boot")):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return False


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _taken(where: str, owner: dict[str, Any] | None) -> UserError:
    who = "another process" if owner is None else f"process {owner.get('pid')} on {owner.get('host')}"
    return UserError(f"{where} is being written by {who}; wait for it, or stop it first (its lock is {LOCK})")
