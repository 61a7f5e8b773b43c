"""Broken variants of the code, one promise each: the explorer has to find them, or it would find nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from stillroom import scripts
from stillroom.cache.judge import Judge
from stillroom.cache.ordering import Ordering
from stillroom.operation import STATE, On
from stillroom.scripts import Script, Text
from stillroom.wire import Server, Wire


@contextmanager
def with_lua(old: str, new: str, *names: str) -> Iterator[None]:
    """These scripts (or all that have it) say something else in one place."""
    everything = [one for one in vars(scripts).values() if isinstance(one, Script)]
    with ExitStack() as stack:
        for script in everything:
            if names and script.name not in names:
                continue
            for kind in ("plain", "flagged"):
                text: Text | None = getattr(script, kind)
                if text is not None and old in text.source:
                    mutated = Text(script, text.source.replace(old, new))
                    stack.enter_context(patch.object(script, kind, mutated))
        yield


@contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    with patch.object(owner, name, function):
        yield


def _sends_twice(self: Wire, link: Any, commands: Any, deadline: float) -> Any:
    try:
        return _real_timed(self, link, commands, deadline)
    except OSError:
        again = self._lease(deadline, check=True)
        return _real_timed(self, again, commands, deadline)


def _does_not_wait(self: Wire, link: Any, commands: Any, deadline: float) -> Any:
    with patch("time.sleep", lambda seconds: None):
        return _real_timed(self, link, commands, deadline)


def _believes_seldom(self: Server, reply: Any, asked_ns: int) -> None:
    if not self._is_clock_known:
        _real_learn(self, reply, asked_ns)


def _too_late(self: Server, deadline: float) -> bytes:
    return _real_not_after(self, deadline + 0.3)


def _trusts_any_server(self: Judge, marks: Any) -> Any:
    self._run = self._clock.run
    clock = (yield [(b"GET", self._keys.clock)])[0]
    return (yield from self._from_the_beginning(clock, []))


def _crosses_off_first(self: Ordering, taken: Any) -> Any:
    yield On([(STATE, self._finish(taken))])
    return (yield from _real_try(self, taken))


_real_timed = copy.copy(Wire._exchange_timed)
_real_learn = copy.copy(Server.learn_clock)
_real_not_after = copy.copy(Server.not_after)
_real_try = copy.copy(Ordering._try)

NOT_AFTER_OF_PUT = "now_us() > tonumber(ARGV[2])"
MUTANTS: dict[str, Callable[[], Any]] = {
    "a timed batch is sent twice": lambda: replaced(Wire, "_exchange_timed", _sends_twice),
    "a batch that died is not waited out": lambda: replaced(
        Wire, "_exchange_timed", _does_not_wait
    ),
    "a late put is taken": lambda: with_lua(NOT_AFTER_OF_PUT, "false", "put"),
    "a late lease is taken": lambda: with_lua("is_late(ARGV[4])", "false", "lease_load"),
    "a deadline is made too late": lambda: replaced(Server, "in_time", _too_late),
    "a clock that was put back makes late things timely": lambda: with_lua(
        "now < tonumber(from) or", ""
    ),
    "a step of the clock is not believed": lambda: replaced(
        Server, "learn_clock", _believes_seldom
    ),
    "any server is trusted": lambda: replaced(Judge, "_verified", _trusts_any_server),
    "an epoch's name begins twice": lambda: with_lua(
        "return name .. string.format('%x', seq)", "return name"
    ),
    "a load is stamped when it is stored": lambda: with_lua(
        "write_entry(KEYS[1], ARGV[2], ARGV[3]",
        "write_entry(KEYS[1], ARGV[2], string.match(redis.call('GET', KEYS[3]), '%d+$')",
        "commit",
    ),
    "a load is stored without its lease": lambda: with_lua(
        "redis.call('GET', KEYS[2]) ~= ARGV[1]", "false", "commit"
    ),
    "an order is crossed off before it is done": lambda: replaced(
        Ordering, "_try", _crosses_off_first
    ),
}
