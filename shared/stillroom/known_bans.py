"""The bans that processes of this machine know of, for the case that Redis is away: then nobody else can say.

They are kept in a file that all of them read and write: a line for each ban, appended when a process meets it,
makes it or lifts it. What Redis says goes before it: while Redis answers nobody looks here.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from zlib import crc32

from stillroom.keys import banned_in, without_home
from stillroom.oldest import oldest
from stillroom.subject import width_of

log = logging.getLogger("stillroom.abuse")

KNOWN = 10_000  # bans that a process remembers
FILE_LIMIT = 1_000_000  # bytes; a longer file is written anew
LOOKS_EVERY_S = 0.2
USUAL = (b"/64}:!ban", b"/48}:!ban")  # ends of most keys that ban a network
NEWS_MS = 1_000  # a ban that ends this much later is another one


class KnownBans:
    """Ban keys and until when, in ms since 1970. Never raises: a machine without the file has its memory.

    `find` says where the file is; it is asked when there is something to write, or Redis is away.
    """

    def __init__(self, find: Callable[[], Path | None]) -> None:
        self._find = find
        self.reset()

    def reset(self) -> None:
        """Know only the bans in the file: a forked process has met nobody yet."""
        self.until: dict[bytes, int] = {}
        self.widths: set[str] = set()  # of networks among them of a width that no process looks for
        self._seen = (0, 0)  # the file's time and size
        self._looked_at = 0.0

    def learn(self, key: bytes, until_ms: int) -> None:
        """Remember a ban, and tell the others. Costs nothing where it is known already."""
        key = without_home(key)
        if self._knows(key, until_ms):
            return
        self.look()
        if self._knows(key, until_ms):
            return
        self._keep(key, until_ms)
        self._append(key, until_ms)

    def forget(self, key: bytes) -> None:
        """Forget a ban: it was lifted."""
        key = without_home(key)
        self.until.pop(key, None)
        self._append(key, 0)

    def forget_all(self, keys: Iterable[bytes]) -> None:
        """Forget these bans: Redis has none of them."""
        for key in [key for key in map(without_home, keys) if key in self.until]:
            self.forget(key)

    def end_sooner(self, ms: int) -> None:
        """Let all bans that this process knows end so many ms earlier: a test has moved its clock."""
        for key, until in list(self.until.items()):
            self._keep(key, until - ms)
            self._append(key, until - ms)

    def look(self) -> None:
        """Take in what others have written since; `until`, `widths` and `left_ms` are what was known then."""
        now = time.monotonic()
        if self._path is None or now - self._looked_at < LOOKS_EVERY_S:
            return
        self._looked_at = now
        with suppress(OSError):
            about = self._path.stat()
            seen = (about.st_mtime_ns, about.st_size)
            if seen != self._seen:
                self._seen = seen
                self._read(self._path.read_bytes())

    def left_ms(self, keys: Iterable[bytes], now_ms: int) -> int:
        """Return how long the longest ban under one of these keys still lasts; 0: none is known."""
        return max([0, *(self.until.get(without_home(key), 0) - now_ms for key in keys)])

    def _knows(self, key: bytes, until_ms: int) -> bool:
        return abs(self.until.get(key, 0) - until_ms) < NEWS_MS

    # The file

    @cached_property
    def _path(self) -> Path | None:
        return self._find()

    def _read(self, content: bytes) -> None:
        for line in content[-FILE_LIMIT:].split(b"\n"):
            until, _, key = line.partition(b" ")
            if not until.isdigit() or not key:
                continue
            if until == b"0":
                self.until.pop(key, None)
            else:
                self._keep(key, int(until[:16]))

    def _append(self, key: bytes, until_ms: int) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, "ab", buffering=0, opener=_open_own) as file:
                # One write: lines of two processes do not mix.
                file.write(b"%d %b\n" % (until_ms, key))
                is_long = os.fstat(file.fileno()).st_size > FILE_LIMIT
            if is_long:
                self._write_anew()
        except OSError as error:
            log.debug("a ban is known to this process only: %s", error)

    def _write_anew(self) -> None:
        """Write the newest bans anew, those that are over too: only the server's clock could tell.

        A line that another process appends meanwhile is lost until it meets that ban again.
        """
        assert self._path is not None
        self.look()
        text = b"".join([b"%d %b\n" % (until, key) for key, until in list(self.until.items())])
        if len(text) > FILE_LIMIT // 2:
            text = text[-FILE_LIMIT // 2 :].partition(b"\n")[2]
        other = self._path.with_suffix(f".{os.getpid()}")
        with open(other, "wb", opener=_open_own) as file:
            file.write(text)
        other.replace(self._path)

    def _keep(self, key: bytes, until_ms: int) -> None:
        self.until.pop(key, None)
        self.until[key] = until_ms
        if b"/" in key and not key.endswith(USUAL):  # there may be thousands of those
            with suppress(ValueError):  # of a line that says something else
                # Another set: other threads may be looking through this one.
                self.widths = self.widths | set(filter(None, [width_of(banned_in(key))]))
        while len(self.until) > KNOWN:
            for first in oldest(self.until, 1):
                self.until.pop(first, None)


def _open_own(path: str, flags: int) -> int:
    """Open a file that is this user's alone, and no link to another one."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def ban_file(given: Path | None, namespace: str, server: str) -> Path | None:
    """Return where the bans of one namespace on one server are kept: the file given, or one in a folder of this
    user's own under the machine's temporary one. None where that folder is somebody else's, or none can be made.
    """
    if given is not None:
        return given
    try:
        # A machine may have no folder that can be written to, as a container with a read-only file system.
        folder = Path(tempfile.gettempdir()) / f"stillroom-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        log.debug("bans are known to each process only: %s", error)
        return None
    is_own = about.st_uid == os.getuid() and not about.st_mode & 0o022 and folder.is_dir()
    if not is_own or folder.is_symlink():
        log.warning("%s is not this user's own folder: bans are known to each process only", folder)
        return None
    return folder / f"{namespace}-{crc32(server.encode()):08x}.bans"
