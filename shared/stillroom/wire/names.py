"""Resolve names of hosts in threads of their own: a name server that hangs holds up no call.

`getaddrinfo` has no deadline. So each lookup runs in a thread; whoever needs it waits as long as its call may take.
The addresses that worked last are kept: they are used while the name server does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address

from stillroom.daemon import Daemon
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.idle import IdleTimeout, Lateness

Addresses = tuple[str, ...]

SHARE = 0.5  # of a caller's patience for the lookup, where there is an address that worked to fall back to


class NameUnanswered(TimeoutError):
    """The name server did not answer in time, and no address of this name is known."""


class Lookup:
    """One question to the name server, and all who wait for its answer."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.began = time.monotonic()
        self.is_done = threading.Event()
        self._addresses: Addresses = ()
        self._error: OSError | None = None
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        self._told: list[Callable[[], object]] = []

    def run(self) -> None:
        try:
            found = socket.getaddrinfo(self.host, None, 0, socket.SOCK_STREAM)
            self._addresses = tuple(dict.fromkeys(str(address[0]) for *_, address in found))
        except OSError as error:
            self._error = error
        except ValueError:  # a label of more than 63 characters, or an empty one, or a zero byte
            self._error = socket.gaierror(socket.EAI_NONAME, "this can't be the name of a host")
        except Exception as error:
            # Whatever it is: the next caller would wait for this lookup for ever.
            self._error = socket.gaierror(socket.EAI_FAIL, f"the lookup failed: {error!r}")
        with self._lock:
            self.is_done.set()
            told, self._told = self._told, []
        for tell in told:
            tell()

    def tell(self, when_done: Callable[[], object]) -> None:
        """Call this from the lookup's thread, or now if there is an answer."""
        with self._lock:
            if not self.is_done.is_set():
                self._told.append(when_done)
                return
        when_done()

    def answer(self) -> Addresses:
        """Return the addresses. Raises socket.gaierror."""
        if self._error is not None:
            raise self._error
        return self._addresses


class Names:
    """The lookups of one process, one at a time for each name."""

    def __init__(self) -> None:
        # The last answer of a name, the address that worked first.
        self._worked: dict[str, Addresses] = {}
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Have no lookup under way: its thread stayed in the parent."""
        self._lock = threading.RLock()
        self._lookups: dict[str, Lookup] = {}

    def addresses(self, host: str, deadline: float) -> Addresses:
        """Return the addresses of this name, before `deadline` (time.monotonic()).

        Raises socket.gaierror for a name that has none, NameUnanswered if that can't be found out in time.
        """
        if is_address(host):
            return (host,)
        lookup, until = self._begun(host, deadline)
        lookup.is_done.wait(max(0.0, until - time.monotonic()))
        return self._outcome(lookup)

    async def addresses_soon(self, host: str, deadline: float) -> Addresses:
        """Return the addresses, for asyncio. It takes no thread of the loop: a loop that ends waits for its own."""
        if is_address(host):
            return (host,)
        lookup, until = self._begun(host, deadline)
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        lookup.tell(partial(tell_loop, loop, done))
        with contextlib.suppress(TimeoutError):
            async with IdleTimeout(Lateness(), until):
                await done
        return self._outcome(lookup)

    def worked(self, host: str, address: str, among: Sequence[str]) -> None:
        """Remember where a connection was made."""
        if address != host:
            self._worked[host] = tuple(dict.fromkeys([address, *among]))

    def _begun(self, host: str, deadline: float) -> tuple[Lookup, float]:
        """Return (the lookup of this name, new or under way; until when to wait for it)."""
        now = time.monotonic()
        with self._lock:
            lookup = self._lookups.get(host)
            if lookup is None:
                self._lookups[host] = lookup = Lookup(host)
                self._start(lookup)
        if host in self._worked:
            deadline = lookup.began + (deadline - now) * SHARE
        return lookup, deadline

    def _start(self, lookup: Lookup) -> None:
        lookup.tell(lambda: self._lookups.pop(lookup.host, None))
        try:
            Daemon(lookup.run, f"resolve {lookup.host}").start()
        except RuntimeError:  # no more threads: better to wait than not to know
            lookup.run()

    def _outcome(self, lookup: Lookup) -> Addresses:
        known = self._worked.get(lookup.host)
        if not lookup.is_done.is_set():
            if known:
                return known
            raise NameUnanswered("the name server did not answer in time")
        try:
            return lookup.answer()
        except socket.gaierror as error:
            if known and error.errno == socket.EAI_AGAIN:  # the name server has no answer just now
                return known
            raise


def is_address(host: str) -> bool:
    """Return whether a host is already an IP address, not a name."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def tell_loop(loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]) -> None:
    """Let who awaits this future go on, from another thread."""

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
        loop.call_soon_threadsafe(tell)


NAMES = Names()
