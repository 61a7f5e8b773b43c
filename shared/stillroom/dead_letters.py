"""Dead letters: work that was asked for and could not be done. A person looks, and sends it again or drops it.

An order of an app that failed too often ends here (cache/ordering.py), and so does a message that no worker can
take. The stream `ns:dead-letters` is on the state's server, where nothing is evicted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.durations import LAST_MOMENT
from stillroom.errors import DeadLetterRefused, NoDeadLetter
from stillroom.keys import Keys
from stillroom.operation import Once, Operation
from stillroom.scripts import dead_letter
from stillroom.whole import number_in
from stillroom.wire import Command

LETTERS_LIMIT = 1_000  # past it the oldest go
KEPT_S = 90 * 86_400  # after the newest
BODY_LIMIT = 64 * 1024  # bytes of a body; of a longer one the beginning is kept, to be looked at
REASON_LIMIT = 1_000  # bytes
PAGE = 100

_ID = re.compile(r"\d{1,20}-\d{1,20}")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One piece of work that could not be done."""

    id: str
    kind: str  # the kind of work, which says how it is sent again: `order` …
    body: str  # JSON, from which it is sent again
    reason: str
    tries: int
    cut: int  # bytes of the body that were not kept

    @property
    def when(self) -> float:
        """Return when the work was given up, in seconds since 1970 by the server's clock."""
        return min(int(self.id.partition("-")[0]) / 1000, LAST_MOMENT)


class DeadLetters:
    """The operations. The state's driver runs them."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        # By kind: the operation that sends a letter's work again. A module with a kind of its own adds it here.
        self.senders: dict[str, Callable[[DeadLetter], Operation[Any]]] = {}

    def add(self, kind: str, body: str, reason: str, tries: int = 1) -> Operation[str]:
        """Keep a letter; returns its id. The 1,000 newest are kept, for 90 days after the newest.

        Of a body over 64 KiB the beginning is kept, which can be looked at and not sent again.
        Redis away: RedisUnavailable.
        """
        text = _bytes(body)
        given = (text[:BODY_LIMIT], _bytes(reason)[:REASON_LIMIT], tries)
        cut = max(0, len(text) - BODY_LIMIT)
        keeps = dead_letter([self._keys.dead_letters], LETTERS_LIMIT, KEPT_S, kind, *given, cut)
        (kept,) = yield Once([keeps])
        return str(kept.decode())

    def burying(
        self, kind: str, body: str, reason: str, tries: int, order: bytes, due: bytes
    ) -> Command:
        """Return the command that makes a letter of an order, and crosses that off if it is still due then. Its
        body is kept whole, whatever its length: it was an app's own.
        """
        keys = [self._keys.dead_letters, self._keys.orders, self._keys.order_tries]
        given = (kind, _bytes(body), _bytes(reason)[:REASON_LIMIT], tries, 0, order, due)
        return dead_letter(keys, LETTERS_LIMIT, KEPT_S, *given)

    def list(self, count: int = PAGE, *, after: str = "") -> Operation[Sequence[DeadLetter]]:
        """Return up to `count` letters, the oldest first; `after`: the id of the last one that was seen.

        Redis away: RedisUnavailable.
        """
        since = f"({_checked(after)}" if after else "-"
        rows = [(b"XRANGE", self._keys.dead_letters, since, b"+", b"COUNT", b"%d" % count)]
        (found,) = yield rows
        return [_letter(*row) for row in found]

    def count(self) -> Operation[int]:
        """Return how many dead letters there are. Redis away: RedisUnavailable."""
        (count,) = yield [(b"XLEN", self._keys.dead_letters)]
        return int(count)

    def show(self, id: str) -> Operation[DeadLetter]:
        """Return one letter. Raises NoDeadLetter. Redis away: RedisUnavailable."""
        (found,) = yield [(b"XRANGE", self._keys.dead_letters, _checked(id), id)]
        if not found:
            raise NoDeadLetter(id)
        return _letter(*found[0])

    def retry(self, id: str) -> Operation[DeadLetter]:
        """Send its work again and drop the letter; returns it.

        The work is sent before the letter goes, so it may be sent twice and is never lost.
        Raises NoDeadLetter; DeadLetterRefused if the body was cut or nobody here knows its kind; what its
        sender raises. Redis away: RedisUnavailable.
        """
        letter = yield from self.show(id)
        if letter.cut:
            raise DeadLetterRefused(id, f"{letter.cut:,} bytes of its body were not kept")
        sender = self.senders.get(letter.kind)
        if sender is None:
            known = ", ".join(sorted(self.senders)) or "no kind"
            raise DeadLetterRefused(id, f"this process can send {known}, not {letter.kind!r}")
        yield from sender(letter)
        yield [self._dropping(id)]
        return letter

    def drop(self, *ids: str) -> Operation[int]:
        """Delete letters; returns how many there were. Redis away: RedisUnavailable."""
        if not ids:
            return 0
        # Once: the second of two that arrive would find none.
        (count,) = yield Once([self._dropping(*ids)])
        return int(count)

    def _dropping(self, *ids: str) -> Command:
        return (b"XDEL", self._keys.dead_letters, *map(_checked, ids))


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def _checked(id: str) -> str:
    """Raise NoDeadLetter for a text that is no id of a stream entry, which the server would refuse
    with an error.
    """
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise NoDeadLetter(id)
    return id


def _letter(id: bytes, fields: Iterable[bytes]) -> DeadLetter:
    texts = [field.decode(errors="replace") for field in fields]
    found: Mapping[str, str] = dict(zip(texts[::2], texts[1::2], strict=False))
    return DeadLetter(
        id=id.decode(),
        kind=found.get("kind", ""),
        body=found.get("body", ""),
        reason=found.get("reason", ""),
        tries=number_in(found.get("tries", "")) or 0,
        cut=number_in(found.get("cut", "")) or 0,
    )
