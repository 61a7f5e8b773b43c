"""Notes for one request what each of its reads of the cache was, and why: for the header of web/explain.py.

Only a room with `explain_header` is made of these classes, so no other pays for them. In such a room a request that
did not ask pays for a look at a context variable; one that asked pays for a few round trips more for each read that
was no hit: see explain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from stillroom.cache.body import CacheBody
from stillroom.cache.bulk import Found
from stillroom.cache.calls import Asked, Look, Unread
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.loaders import Recipe
from stillroom.cache.loads import Attempt
from stillroom.cache.lookup import Looked, Wish
from stillroom.cache.near import Called, Store, remembered_by
from stillroom.codec import MISS
from stillroom.errors import RedisUnavailable
from stillroom.keys import written
from stillroom.operation import Operation
from stillroom.settings import Settings
from stillroom.stats import Stats

MOST = 50  # reads of one request that are noted


class Read(NamedTuple):
    """Tell what one read was: `hit`, `near` (from this process), `stale`, `miss` or `away`, and why.

    `cause` is one of Explanation's; `copy` of a near read, `request` of what the request had read before, `loaded`
    where another caller has stored it since; of `away` the wire's word.
    """

    key: str
    outcome: str
    cause: str
    by: str | None = None  # the tag or the pattern
    loader: str | None = None


class Trace:
    """The reads of one request, in their order."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.left_out = 0
        self._last: dict[bytes, int] = {}

    @property
    def is_full(self) -> bool:
        return len(self.reads) >= MOST

    def note(self, name: bytes, read: Read) -> None:
        if self.is_full:
            self.left_out += 1
            return
        self._last[name] = len(self.reads)
        self.reads.append(read)

    def amend(self, name: bytes, outcome: str, cause: str) -> None:
        """Say of the last read of this key that it was something else in the end."""
        at = self._last.get(name)
        if at is not None:
            self.reads[at] = self.reads[at]._replace(outcome=outcome, cause=cause, by=None)

    def last(self) -> list[tuple[bytes, Read]]:
        """Return the last read of each key, by its name."""
        return [(name, self.reads[at]) for name, at in self._last.items()]

    def mark(self, name: bytes) -> tuple[int | None, int]:
        """Return what is another thing once a further read of this key is noted."""
        return self._last.get(name), self.left_out


_trace: ContextVar[Trace | None] = ContextVar("stillroom_trace", default=None)
tracing = _trace.get


@contextmanager
def traced() -> Iterator[Trace]:
    """Note the reads that happen inside. They are those of rooms with `explain_header`."""
    token = _trace.set(trace := Trace())
    try:
        yield trace
    finally:
        _trace.reset(token)


class TracedStore(Store):
    """The copies of a cache whose reads are noted."""

    def of_call(self, loader: Called, args: tuple[Any, ...]) -> Any:
        trace = tracing()
        call = None if trace is None else remembered_by(loader, args)
        copy = None if call is None else self._calls.get(call)
        value = super().of_call(loader, args)
        if trace is not None and copy is not None and value is not MISS:
            name = copy.entry.key
            trace.note(name, Read(written(name), "near", "copy", loader=loader.name))
        return value


class TracedBody(CacheBody):
    """A cache, or one of its shards, whose reads are noted where a request asks for it."""

    def _goes_ahead(self) -> bool:
        return tracing() is None and super()._goes_ahead()

    def _look(
        self, name: bytes, release: bytes = b"", looked: Looked | None = None
    ) -> Operation[Look]:
        looking = super()._look(name, release, looked)
        return looking if tracing() is None else self._noted(name, looking)

    def _look_to_keep(self, name: bytes, wish: Wish) -> Operation[Look]:
        looking = super()._look_to_keep(name, wish)
        return looking if tracing() is None else self._noted(name, looking)

    def _look_once(self, name: bytes, release: bytes) -> Operation[Look]:
        looking = super()._look_once(name, release)
        return looking if tracing() is None else self._noted_without(name, looking, "request")

    def _look_near(self, name: bytes, wish: Wish) -> Operation[Look]:
        looking = super()._look_near(name, wish)
        return looking if tracing() is None else self._noted_without(name, looking, "copy")

    def _look_beside(
        self, name: bytes, type: Any
    ) -> Operation[tuple[Entry | None, Freshness, Any]]:
        entry, freshness, value = yield from super()._look_beside(name, type)
        if (trace := tracing()) is not None and value is not MISS:
            trace.amend(name, _OUTCOMES[freshness], _CAUSES[freshness])
        return entry, freshness, value

    def _look_many(
        self, names: Sequence[bytes], fits: Callable[[Entry, Freshness], bool]
    ) -> Operation[list[Found | None]]:
        found = yield from super()._look_many(names, fits)
        for name, one in zip(names, found, strict=True) if tracing() is not None else ():
            yield from self._note(name, one or (None, Freshness.DEAD))
        return found

    def call_many(self, calls: Sequence[Asked]) -> Operation[list[Any]]:
        """Look up calls of loaders. One that is to be made by itself is noted when that happens."""
        trace = tracing()
        if trace is None:
            return (yield from super().call_many(calls))
        with traced() as looks:
            values = yield from super().call_many(calls)
        names = [self.wanted(*call).name for call in calls]
        unread = {name for name, value in zip(names, values, strict=True) if type(value) is Unread}
        for name, read in looks.last():
            if name not in unread:
                trace.note(name, read)
        trace.left_out += looks.left_out
        return values

    def _look_again_many(
        self, held: Mapping[str, bytes], recipe: Recipe, waited_for: dict[bytes, None]
    ) -> Operation[dict[str, Attempt]]:
        """Look whether other callers have loaded these keys. Each is noted already, as a miss."""
        trace = tracing()
        _trace.set(None)
        try:
            return (yield from super()._look_again_many(held, recipe, waited_for))
        finally:
            _trace.set(trace)

    def _decode(self, entry: Entry, type: Any) -> Any:
        value = super()._decode(entry, type)
        if value is MISS and (trace := tracing()) is not None:
            trace.amend(entry.key, "miss", "unreadable")
        return value

    def _noted(self, name: bytes, looking: Operation[Look]) -> Operation[Look]:
        """Note a read that asks Redis."""
        trace = tracing()
        before = trace.mark(name) if trace is not None else None
        try:
            found = yield from looking
        except RedisUnavailable as error:
            if trace is not None:
                trace.note(name, Read(written(name), "away", error.reason))
            raise
        if trace is not None and trace.mark(name) == before:  # else it was noted further in
            yield from self._note(name, found)
        return found

    def _noted_without(self, name: bytes, looking: Operation[Look], cause: str) -> Operation[Look]:
        """Note a read that did not ask Redis, if it did not."""
        trace = tracing()
        before = trace.mark(name) if trace is not None else None
        found = yield from looking
        if trace is not None and trace.mark(name) == before and found[0] is not None:
            trace.note(name, Read(written(name), "near", cause, loader=found[0].loader or None))
        return found

    def _note(self, name: bytes, found: Look) -> Operation[None]:
        """Note what Redis was asked for: a hit as it is, and all else with what Redis says of it."""
        trace, (entry, freshness) = tracing(), found
        if trace is None:
            return
        outcome, cause = _OUTCOMES[freshness], _CAUSES[freshness]
        read = Read(written(name), outcome, cause, loader=(entry and entry.loader) or None)
        if outcome != "hit" and not trace.is_full:
            read = yield from self._why_not_a_hit(read)
        trace.note(name, read)

    def _why_not_a_hit(self, read: Read) -> Operation[Read]:
        try:
            said = yield from self.explain(read.key)
        except RedisUnavailable:
            return read
        cause = said.cause if said.outcome == read.outcome else "loaded"
        return read._replace(cause=cause, by=said.by, loader=said.loader or read.loader)


def body_of(settings: Settings) -> type[CacheBody]:
    """Return the class that a cache of these settings is made of."""
    return TracedBody if settings.explain_header else CacheBody


def store_of(settings: Settings, stats: Stats) -> Store:
    """Return the store of copies of a cache of these settings."""
    return (TracedStore if settings.explain_header else Store)(settings.near_limit, stats)


_OUTCOMES = {Freshness.FRESH: "hit", Freshness.STALE: "stale", Freshness.DEAD: "miss"}
_CAUSES = {Freshness.FRESH: "fresh", Freshness.STALE: "expired", Freshness.DEAD: "unknown"}
