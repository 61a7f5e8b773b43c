"""Broken variants of the code, one promise each: the explorer has to find them, or it would find nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from stillroom import scripts
from stillroom.cache.judge import Judge
from stillroom.scripts import Script, Text
from stillroom.wire import Server, Wire
from stillroom.wire.server import pack_timed


@contextmanager
def with_lua(old: str, new: str, *names: str) -> Iterator[None]:
    """These scripts (or all that have it) say something else in one place."""
    everything = [one for one in vars(scripts).values() if isinstance(one, Script)]
    changed = 0
    with ExitStack() as stack:
        for script in everything:
            if names and script.name not in names:
                continue
            for kind in ("plain", "flagged"):
                text: Text | None = getattr(script, kind)
                if text is not None and old in text.source:
                    mutated = Text(script, text.source.replace(old, new))
                    stack.enter_context(patch.object(script, kind, mutated))
                    changed += 1
        assert changed, f"no script says {old!r} any more, so nothing is broken"
        yield


@contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    with patch.object(owner, name, function):
        yield


def _does_not_wait(self: Wire, link: Any, commands: Any, deadline: float) -> Any:
    server, now = self.server, time.monotonic()
    if not server.is_clock_good:
        server.due = 0.0
        self._exchange(link, b"", 0, deadline, now)
    given_up = min(deadline, time.monotonic() + server.settings.command_timeout)
    packed = pack_timed(commands, server.in_time(now, given_up))
    return self._exchange(link, packed, len(commands), given_up, time.monotonic())


def _sends_twice(self: Wire, link: Any, commands: Any, deadline: float) -> Any:
    try:
        return _does_not_wait(self, link, commands, deadline)
    except ConnectionResetError:
        return _does_not_wait(
            self, self._lease(check=True) or self._open_or_await(deadline), commands, deadline
        )


def _too_late(self: Server, now: float, deadline: float) -> bytes:
    return _real_in_time(self, now, deadline + 0.3)


def _trusts_any_server(self: Judge, marks: Any) -> Any:
    self._run = self._clock.run
    clock = (yield [(b"GET", self._keys.clock)])[0]
    return (yield from self._from_the_beginning(clock, []))


_real_in_time = copy.copy(Server.in_time)

MUTANTS: dict[str, Callable[[], Any]] = {
    "a timed batch is sent twice": lambda: replaced(Wire, "_exchange_timed", _sends_twice),
    "a batch that died is not waited out": lambda: replaced(
        Wire, "_exchange_timed", _does_not_wait
    ),
    "a late put is taken": lambda: with_lua("is_late(ARGV[2])", "false", "put"),
    "a deadline is made too late": lambda: replaced(Server, "in_time", _too_late),
    "any server is trusted": lambda: replaced(Judge, "_verified", _trusts_any_server),
    "all epochs have one name": lambda: with_lua(
        "return name .. string.format('%x', seq)", "return 'e'"
    ),
    "a load is stamped when it is stored": lambda: with_lua(
        "write_entry(place, ARGV[2], ARGV[3]",
        "write_entry(place, ARGV[2], string.match(redis.call('GET', KEYS[3]), '%d+$')",
        "commit",
    ),
    "a load is stored without its lease": lambda: with_lua(
        "redis.call('GET', KEYS[2]) ~= ARGV[1]", "false", "commit"
    ),
}
