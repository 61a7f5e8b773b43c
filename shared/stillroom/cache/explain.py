"""Why a read of a key is a hit, stale or a miss: told by what stands in Redis, not by what this process knows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stillroom.cache.entry import Corrupt, Entry, parse
from stillroom.cache.glob import compile_glob
from stillroom.cache.loaders import Loader
from stillroom.cache.lookup import Lookup
from stillroom.cache.marks import TRIMMED, question, read_clock, seqs_of
from stillroom.codec import Undecodable
from stillroom.keys import original, sanitized, written
from stillroom.operation import Operation


@dataclass(frozen=True, slots=True)
class Explanation:
    """Tell what is under a key, and why a reader gets what it gets. Times: seconds since 1970, the server's clock.

    `outcome` is what a read would be now: `hit`, `stale` or `miss`. `cause` is one word for why: `fresh`, `expired`
    (its ttl is over), `soft` (invalidated softly), `tag`, `pattern`, `epoch` (the cache was cleared, or its clock
    was lost), `trimmed`, `release` (another release's), `unreadable`, `gone` (its time was up), `removed` (evicted,
    or invalidated by its key), `never` (nothing says that it was ever stored). `why` says it in a sentence.
    """

    key: str
    outcome: str
    cause: str
    why: str
    by: str | None = None  # the tag or the pattern that invalidated it
    invalidated_at: float | None = None
    loader: str | None = None
    tags: tuple[str, ...] = ()
    size: int | None = None  # bytes in Redis
    fresh_until: float | None = None
    ends_at: float | None = None
    # At the most, for an entry may end earlier by chance (jitter). Known where it names its loader, which is known
    # here, and whose ttl is a number.
    age_s: float | None = None
    # The work under way: `load`, `refresh asked for`, `refresh`, `backoff`.
    loading: str | None = None
    args: Mapping[str, Any] | None = None  # the loader's arguments, as far as the entry names them
    value: Any = None  # only where it was asked for


class _Found(NamedTuple):
    """Hold what Redis has under a key, as it was read: in its first place, and in the other one."""

    raws: Sequence[bytes | None]
    left_ms: Sequence[int]
    clock: bytes | None
    lease: bytes | None
    now_ms: int

    @property
    def is_nothing(self) -> bool:
        return all(raw is None for raw in self.raws)

    def entries(self, name: bytes) -> list[Entry]:
        """Return the entries that can be read."""
        parsed = [_read(raw, name) for raw in self.raws]
        return [
            one._replace(is_beside=bool(place))
            for place, one in enumerate(parsed)
            if one is not None
        ]


class _Why(NamedTuple):
    outcome: str
    cause: str
    why: str
    by: str = ""
    seq: int = 0


class Explainer(Lookup):
    """The operation that explains a key. It changes nothing, and counts nothing."""

    def explain(self, key: str, *, value: bool = False) -> Operation[Explanation]:
        """Say what is under `key`, and why a reader of it has a hit, gets a stale value, or misses.

        `value`: with the value itself, as far as it can be read. For operators: it takes a few round trips.
        Raises InvalidKey; SettingsDiffer where this process has another number of shards than the others, and so
        does not know where they keep it. Redis away: RedisUnavailable.
        """
        name = sanitized(key)
        yield from self.terms.agree()
        found = yield from self._everything_under(name)
        entries = found.entries(name)
        loader = self._loader_of(key, entries)
        entry, why = yield from self._why(found, entries, loader)
        if found.is_nothing and loader is not None:
            why = (yield from self._why_absent(name, key, loader, found.now_ms)) or why
        return self._explained(key, found, entry, why, loader, value)

    def _everything_under(self, name: bytes) -> Operation[_Found]:
        keys = self.keys
        places = keys.entry(name), keys.other(name)
        asked = [
            (b"MGET", *places, keys.clock, keys.lease(name)),
            (b"PTTL", places[0]),
            (b"PTTL", places[1]),
        ]
        (*raws, clock, lease), *left_ms = yield asked
        return _Found(raws, left_ms, clock, lease, self.now_ms())

    def _why(
        self, found: _Found, entries: Sequence[Entry], loader: Loader | None
    ) -> Operation[tuple[Entry | None, _Why]]:
        """Return (the entry if it is readable, what a reader makes of it)."""
        release = loader.release if loader else b""
        own = [e for e in entries if not release or e.release in (release, b"")]
        if not entries:
            if found.is_nothing:
                return None, _Why("miss", "never", "Nothing is stored under this key.")
            said = "What is stored under this key is no entry that can be read."
            return None, _Why("miss", "unreadable", said)
        if not own:
            said = "It was stored by another release of the app, whose values have another type."
            return entries[0], _Why("miss", "release", said)
        first = yield from self._verdict(own[0], found)
        if len(own) > 1 and not release and first.outcome == "miss":  # as _look_at_both does
            return own[1], (yield from self._verdict(own[1], found))
        return own[0], first

    def _verdict(self, entry: Entry, found: _Found) -> Operation[_Why]:
        try:
            epoch, seq = read_clock(found.clock or b"")
        except ValueError:
            said = (
                "The clock of invalidations is lost: nothing that was stored before can be trusted."
            )
            return _Why("miss", "epoch", said)
        if entry.epoch != epoch:
            said = "It is of another epoch: the cache was cleared since, or its server was another one."
            return _Why("miss", "epoch", said)
        if entry.stamp > seq:
            return _Why("miss", "epoch", "Its stamp is ahead of the clock, which was put back.")
        return (yield from self._by_marks(entry, epoch, found.now_ms))

    def _by_marks(self, entry: Entry, epoch: bytes, now_ms: int) -> Operation[_Why]:
        asked = question(entry.tags, epoch)
        scores, globs = yield [
            (b"ZMSCORE", self.keys.marks, *asked),
            (b"ZRANGE", self.keys.globs, b"0", b"-1", b"WITHSCORES"),
        ]
        at = dict(zip(asked, seqs_of(scores), strict=True))
        if at.get(TRIMMED, 0) > entry.stamp:
            said = "It is older than any entry can be: the marks of its time are gone."
            return _Why("miss", "trimmed", said)
        hard = _newest((written(tag), at.get(b"t:" + tag, 0)) for tag in entry.tags)
        if hard[1] > entry.stamp:
            return _Why("miss", "tag", f"Its tag {hard[0]} was invalidated.", *hard)
        matching = zip(globs[::2], seqs_of(globs[1::2]), strict=True)
        glob = _newest(
            (g.decode(errors="replace"), s)
            for g, s in matching
            if s > entry.stamp and compile_glob(g)(original(entry.key))
        )
        if glob[1]:
            said = f"The pattern {glob[0]} was invalidated, which matches it."
            return _Why("miss", "pattern", said, *glob)
        soft = _newest((written(tag), at.get(b"s:" + tag, 0)) for tag in entry.tags)
        if soft[1] > entry.stamp:
            said = (
                f"Its tag {soft[0]} was invalidated softly: it is served while it is loaded again."
            )
            return _Why("stale", "soft", said, *soft)
        if now_ms < entry.fresh_until:
            return _Why("hit", "fresh", "It is fresh.")
        return _Why("stale", "expired", "Its ttl is over: it is served while it is loaded again.")

    def _why_absent(
        self, name: bytes, key: str, loader: Loader, now_ms: int
    ) -> Operation[_Why | None]:
        """Return what the indexes of its tags remember of a missing entry."""
        tags = [sanitized(tag) for tag in tags_of_key(loader, key)]
        if not tags:
            return None
        scores = yield [(b"ZSCORE", self.keys.index(tag), name) for tag in tags]
        ends_ms = max(seqs_of(scores), default=0)
        if not ends_ms:
            return None
        if ends_ms <= now_ms:
            ago = (now_ms - ends_ms) / 1000
            return _Why("miss", "gone", f"Its ttl and swr were over {ago:.0f} s ago.")
        left = (ends_ms - now_ms) / 1000
        said = f"It had {left:.0f} s to live: the server has evicted it, or it was invalidated by its key."
        return _Why("miss", "removed", said)

    def _loader_of(self, key: str, entries: Sequence[Entry]) -> Loader | None:
        """Return the loader whose template fits this key: of several the one that an entry names, or the longest
        one."""
        makers = {entry.loader for entry in entries}
        known = [self.loaders[name] for name in self.loaders.names()]
        fitting = [one for one in known if one.read_key(key) is not None]
        return max(fitting, key=lambda one: (one.name in makers, len(one.template)), default=None)

    def _explained(
        self,
        key: str,
        found: _Found,
        entry: Entry | None,
        why: _Why,
        loader: Loader | None,
        with_value: bool,
    ) -> Explanation:
        raw = found.raws[entry.is_beside] if entry is not None else found.raws[0] or found.raws[1]
        said: Mapping[str, Any] = {} if entry is None else self._facts(entry, found, loader)
        if entry is not None and with_value:
            said = {**said, "value": self._shown_value(entry)}
        return Explanation(
            key=key,
            outcome=why.outcome,
            cause=why.cause,
            why=why.why,
            by=why.by or None,
            invalidated_at=why.seq / 1e6 if why.seq else None,
            size=None if raw is None else len(raw),
            loading=_loading(found.lease),
            **{"loader": loader.name if loader else None, **said},
        )

    def _facts(self, entry: Entry, found: _Found, loader: Loader | None) -> Mapping[str, Any]:
        age, left_ms = None, found.left_ms[entry.is_beside]
        if loader is not None and loader.name == entry.loader and loader.keeping.ttl_of is None:
            ttl_ms = loader.keeping.life.ttl
            age = max(0.0, (found.now_ms - entry.fresh_until + ttl_ms) / 1000)
        return {
            "loader": entry.loader or (loader.name if loader else None),
            "tags": tuple(map(written, entry.tags)),
            "fresh_until": entry.fresh_until / 1000,
            "args": _args(entry.source),
            "ends_at": (found.now_ms + left_ms) / 1000 if left_ms > 0 else None,
            "age_s": age,
        }

    def _shown_value(self, entry: Entry) -> Any:
        try:
            return self._codec.decode(entry.codec, entry.payload, Any)
        except Undecodable:
            return None


def tags_of_key(loader: Loader, key: str) -> Iterator[str]:
    """Return the tags that an entry under this key has, as far as the key shows them."""
    fields = loader.read_key(key) or {}
    for template in loader.tag_templates:
        try:
            yield template.format_map(fields)
        except KeyError:
            continue


def _read(raw: bytes | None, name: bytes) -> Entry | None:
    try:
        return None if raw is None else parse(raw, name)
    except Corrupt:
        return None


def _newest(marked: Iterable[tuple[str, int]]) -> tuple[str, int]:
    return max(marked, key=lambda one: one[1], default=("", 0))


_LEASES: Mapping[bytes, str] = {
    b"load": "load",
    b"refresh": "refresh asked for",
    b"working": "refresh",
    b"backoff": "backoff",
}


def _loading(lease: bytes | None) -> str | None:
    return _LEASES.get((lease or b"").partition(b".")[0])


def _args(source: bytes) -> Mapping[str, Any] | None:
    try:
        args = json.loads(source.partition(b" ")[2])
    except (ValueError, RecursionError):
        return None
    return args if isinstance(args, dict) else None
