"""Settings that all processes of a namespace must have alike, and how a process finds out that it differs.

Some settings say what bytes in Redis mean: the number of shards, how long a lease may be, how wide a network is.
Two processes that differ there break promises that each of them keeps alone. So the agreed values stand in Redis
(`ns:agreed`, on the state's server) with the process that brought them. A process compares its own when it first
connects, again when it meets another run of that server, which may have forgotten them, and once a minute: somebody
may have emptied the server, and a process with another value been the first that came.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from stillroom.errors import RedisUnavailable, SettingsDiffer
from stillroom.keys import Keys
from stillroom.operation import Once, Operation
from stillroom.scripts import agree
from stillroom.shown import shown
from stillroom.wire import Command

FIELDS_LIMIT = 1_000
TEXT_LIMIT = 200  # characters of a value, or of a process' name, that are shown
ASK_AGAIN_S = 5.0  # after the server did not answer
COMPARED_S = 60.0  # and then once more


class Rule(Enum):
    """Say what happens when a process has another value than the agreed one."""

    SAME = "same"  # it is an error: see Agreed.check
    LARGEST = "largest"  # the larger number becomes the agreed one, for all who ask from then on
    SMALLEST = "smallest"  # the smaller one does
    CHANGE = "change"  # it becomes the agreed one: a person has said so


class Agreement(NamedTuple):
    """Hold what is agreed about one setting, and what this process has."""

    setting: str
    agreed: str
    mine: str
    id: int  # when it was agreed, µs since 1970 by the server's clock; another id is another agreement
    who: str  # the process that brought it
    is_new: bool  # nothing was agreed before this process asked


class HasRun(Protocol):
    """A server of which the process knows the run."""

    @property
    def run(self) -> bytes: ...


class Agreed:
    """The settings of one process that must agree with the others'. Its operations are for the state's driver."""

    def __init__(self, keys: Keys, server: HasRun) -> None:
        self._keys = keys
        self._server = server
        self._mine: dict[str, tuple[str, Rule]] = {}
        self._known: dict[str, Agreement] = {}
        self._compared_on: bytes | None = None
        self._not_before = 0.0  # time.monotonic(): the server is not asked with every call

    def require(self, setting: str, value: object, rule: Rule = Rule.SAME) -> None:
        """Compare this setting from now on. `value` is written as text; two that mean the same have one text."""
        self._mine[setting] = str(value), rule
        self._compared_on, self._not_before = None, 0.0

    @property
    def is_due(self) -> bool:
        """Return whether the settings are to be compared with what the server knows now."""
        if self._compared_on is not None and self._compared_on != self._server.run:
            return True
        return time.monotonic() >= self._not_before

    def ask_again(self) -> None:
        """Have them compared before the next call: another server may know otherwise."""
        self._compared_on, self._not_before = None, 0.0

    def compare(self) -> Operation[Mapping[str, Agreement]]:
        """Ask what is agreed. Returns the agreements by setting.

        Cost: one script. Redis away: RedisUnavailable; then nothing is known, and it is due again.
        """
        if self._compared_on is not None:  # other calls go on with what is known
            self._not_before = time.monotonic() + ASK_AGAIN_S
        try:
            told = yield from self._ask(
                [(name, *mine_and_rule) for name, mine_and_rule in self._mine.items()]
            )
        except RedisUnavailable:
            self._compared_on, self._not_before = None, time.monotonic() + ASK_AGAIN_S
            raise
        self._known = {**self._known, **told}
        self._compared_on, self._not_before = self._server.run, time.monotonic() + COMPARED_S
        return self._known

    def change(self, *settings: str) -> Operation[Mapping[str, Agreement]]:
        """Let the values of this process be the agreed ones from now on. Returns the agreements by setting.

        Every other process must have ended: see docs/operating.md for the order of steps.
        Raises KeyError for a setting that is not compared. Redis away: RedisUnavailable.
        """
        wanted = [(name, self._mine[name][0], Rule.CHANGE) for name in settings]
        # Once: a copy that arrives behind another change would undo that one.
        told = yield from self._ask(wanted, Once)
        self._known = {**self._known, **told}
        return told

    def of(self, setting: str) -> Agreement | None:
        """Return what was agreed when this process last asked, or None if it could not ask yet."""
        return self._known.get(setting)

    def check(self, *settings: str) -> None:
        """Raise SettingsDiffer if this process has another value of one of these settings than the others."""
        for name in settings:
            known = self._known.get(name)
            if known is not None and known.agreed != known.mine:
                raise SettingsDiffer(name, known.mine, known.agreed, known.who)

    @property
    def settings(self) -> Sequence[str]:
        """Return the names of what is compared."""
        return list(self._mine)

    def _ask(
        self,
        wanted: Sequence[tuple[str, str, Rule]],
        kind: Callable[[Sequence[Command]], list[Command]] = list,
    ) -> Operation[dict[str, Agreement]]:
        if not wanted:
            return {}
        words = [word for name, value, rule in wanted for word in (name, value, rule.value)]
        (told,) = yield kind([agree([self._keys.agreed], this_process(), FIELDS_LIMIT, *words)])
        rows = zip(wanted, told[::4], told[1::4], told[2::4], told[3::4], strict=True)
        return {
            name: Agreement(name, _text(agreed), mine, int(number), _text(who), bool(is_new))
            for (name, mine, _), agreed, number, who, is_new in rows
        }


def _text(reply: bytes) -> str:
    """Return what is kept, as it may stand in a log: whoever may write into the namespace chose it."""
    return shown(reply.decode(errors="replace"), TEXT_LIMIT)


def this_process() -> str:
    """Return the name of this process in texts for people: `web-1 (process 42)`."""
    return f"{socket.gethostname()} (process {os.getpid()})"
