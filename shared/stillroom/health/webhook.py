"""Tells somebody outside: findings that begin and end, and patterns of abuse, posted to one address.

What there is to tell stands in two streams, of findings and of patterns; how far it was told stands beside them. So
nothing is lost while the address does not answer, and a bite that was posted by a worker that died is posted again:
each event has an id, by which the receiver may drop a second one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from stillroom.health.past import patterns_in
from stillroom.health.report import Advice
from stillroom.keys import Keys
from stillroom.operation import Call, Freeing, Operation
from stillroom.scripts import release, webhook_lease, webhook_note
from stillroom.settings import Settings
from stillroom.shown import shown
from stillroom.whole import number_in
from stillroom.wire import Command

log = logging.getLogger("stillroom.health")

KEPT = 1_000  # findings in the stream
KEPT_S = 8 * 86_400  # after the newest
EVENTS_IN_ONE = 20  # of each stream, in one request
REQUESTS_IN_ONE = 5  # per task; what is left is told by the next
LEASE_MS = 60_000  # longer than all requests of a task may take
FIRST_RETRY_S, LONGEST_RETRY_S = 60, 3_600
TRIES = 10  # then these events are given up: some eight hours
TEXT_LIMIT = 300  # characters of one event's line
ANOTHERS = "another worker tells it"
FINDINGS, PATTERNS = b"findings", b"patterns"
_PLACE = re.compile(rb"\d{1,19}-\d{1,19}")
Report = dict[str, Any]


class Webhook:
    """The operations. The state's driver runs them."""

    def __init__(self, settings: Settings, keys: Keys, now_ms: Callable[[], int]) -> None:
        self._settings = settings
        self._keys = keys
        self._now_ms = now_ms
        self._streams = {FINDINGS: keys.webhook, PATTERNS: keys.abuse_log}

    @property
    def is_on(self) -> bool:
        return self._settings.webhook_url is not None

    @property
    def most(self) -> int:
        """Return how many findings its stream keeps; 0 if there is no webhook."""
        return KEPT if self.is_on else 0

    def begun(self, name: str, found: Advice) -> bytes:
        """Return the event that this finding has begun, as its stream keeps it. `name`: as it is told."""
        if not self.is_on:
            return b""
        about = found.model_dump(exclude={"since"})
        return json.dumps({"kind": "finding", "name": name, **about}).encode()

    def tell(self) -> Operation[Report]:
        """Post what has happened since it was last told. Returns {"told": events, "outcome"}.

        One worker at a time does it. An address that refuses is tried again after a minute, then after twice as
        long, up to an hour; after ten tries the events of that request are given up. Redis away: RedisUnavailable.
        """
        if not self.is_on:
            return {"told": 0, "outcome": "no webhook"}
        token = secrets.token_hex(8)
        keys = [self._keys.webhook_lease, self._keys.webhook_at]
        ((holder, found),) = yield [webhook_lease(keys, token, LEASE_MS, KEPT_S)]
        if holder != token.encode():
            return {"told": 0, "outcome": ANOTHERS}
        at = dict(zip(found[::2], found[1::2], strict=True))
        try:
            report: Report = yield from self._tell(token, at)
        except GeneratorExit:
            raise
        except BaseException:
            yield self._freeing(token)
            raise
        yield self._freeing(token)
        return report

    def _freeing(self, token: str) -> Freeing:
        return Freeing([release([self._keys.webhook_lease], token)])

    def _tell(self, token: str, at: Mapping[bytes, bytes]) -> Operation[Report]:
        # A longer wait was noted by a clock that has been set back since.
        if 0 < _number(at, b"retry_ms") - self._now_ms() <= LONGEST_RETRY_S * 1000:
            return {"told": 0, "outcome": "waits to try again"}
        places = yield from self._places(token, at)
        told, failures = 0, _number(at, b"failures")
        for _ in range(REQUESTS_IN_ONE):
            events, places = yield from self._next(places)
            if not events:
                break
            refused = yield from self._post(events)
            if refused and failures + 1 < TRIES:
                yield from self._put_off(token, failures + 1, refused, len(events))
                return {"told": told, "outcome": refused}
            if refused:
                log.error("the webhook is given up for %d events: %s", len(events), shown(refused))
            failures, told = 0, told + (0 if refused else len(events))
            (is_noted,) = yield self._reached(token, places)
            if not is_noted:  # this worker stood still for longer than its lease
                return {"told": told, "outcome": ANOTHERS}
        return {"told": told, "outcome": "told"}

    def _places(self, token: str, at: Mapping[bytes, bytes]) -> Operation[dict[bytes, bytes]]:
        """Return how far each stream was told. Patterns from before the webhook are not told."""
        places = {FINDINGS: _place(at, FINDINGS) or b"0-0", PATTERNS: _place(at, PATTERNS)}
        if not places[PATTERNS]:
            newest = (b"XREVRANGE", self._keys.abuse_log, b"+", b"-", b"COUNT", b"1")
            (entries,) = yield [newest]
            places[PATTERNS] = entries[0][0] if entries else b"0-0"
            yield self._reached(token, places)
        return places

    def _next(
        self, places: Mapping[bytes, bytes]
    ) -> Operation[tuple[list[Report], dict[bytes, bytes]]]:
        """Return (the events behind these places, the places behind them)."""
        count = (b"+", b"COUNT", b"%d" % EVENTS_IN_ONE)
        asked = [(b"XRANGE", key, b"(" + places[s], *count) for s, key in self._streams.items()]
        replies = yield asked
        found = dict(zip(self._streams, replies, strict=True))
        behind = {s: rows[-1][0] if rows else places[s] for s, rows in found.items()}
        return [*_findings(found[FINDINGS]), *_patterns(found[PATTERNS])], behind

    def _post(self, events: Sequence[Report]) -> Operation[str]:
        """Post the events; return why they were refused, or nothing."""
        from stillroom.health.post import Refused, post  # slow to import: only where it is wanted

        address = self._settings.webhook_url
        namespace, release = self._settings.namespace, self._settings.release
        about = {"text": text_of(events, namespace, release), "namespace": namespace}
        body = json.dumps({**about, "release": release, "events": events}).encode()
        try:
            yield Call(post, (address and address.get_secret_value(), body, self._signed(body)))
        except Refused as refused:
            return str(refused)
        return ""

    def _signed(self, body: bytes) -> Mapping[str, str]:
        secret = self._settings.webhook_secret
        if secret is None:
            return {}
        digest = hmac.new(secret.get_secret_value().encode(), body, hashlib.sha256).hexdigest()
        return {"Stillroom-Signature": f"sha256={digest}"}

    def _put_off(self, token: str, failures: int, why: str, count: int) -> Operation[None]:
        wait_s = min(FIRST_RETRY_S * 2 ** (failures - 1), LONGEST_RETRY_S)
        said = "the webhook did not take %d events (%s); it is tried again in %.0f min"
        log.warning(said, count, shown(why), wait_s / 60)
        at = self._now_ms() + wait_s * 1000
        yield self._noting_at(token, b"failures", b"%d" % failures, b"retry_ms", b"%d" % at)

    def _reached(self, token: str, places: Mapping[bytes, bytes]) -> list[Command]:
        pairs = [word for pair in places.items() for word in pair]
        return self._noting_at(token, *pairs, b"failures", b"0", b"retry_ms", b"0")

    def _noting_at(self, token: str, *pairs: bytes) -> list[Command]:
        return [webhook_note([self._keys.webhook_at], token, KEPT_S, *pairs)]


def _number(at: Mapping[bytes, bytes], field: bytes) -> int:
    return number_in(at.get(field, b"")) or 0


def _place(at: Mapping[bytes, bytes], stream: bytes) -> bytes:
    """Return how far a stream was told; empty where that is not known, or something else was written there."""
    place = at.get(stream, b"")
    return place if _PLACE.fullmatch(place) else b""


def _findings(rows: Iterable[Sequence[Any]]) -> Iterator[Report]:
    """Return the findings of the stream's entries, without another writer's."""
    for name, fields in rows:
        try:
            event = from_json(fields[1], allow_inf_nan=False)  # what receivers can read
        except (ValueError, IndexError):
            continue
        if isinstance(event, dict) and isinstance(event.get("kind"), str):
            yield {"id": f"finding {name.decode()}", **event}


def _patterns(rows: Sequence[Sequence[Any]]) -> Iterator[Report]:
    for row in rows:
        for pattern in patterns_in([row]):
            yield {"id": f"pattern {row[0].decode()}", "kind": "pattern", **pattern.model_dump()}


def text_of(events: Sequence[Report], namespace: str, release: str | None) -> str:
    """Return the events as a text for a person, as chats show it. `<`, `>` and `&` are escaped."""
    whose = f"{namespace} ({release})" if release else namespace
    return "\n".join(_plain(f"{whose}: {_line(event)}") for event in events)


def _line(event: Report) -> str:
    match event["kind"]:
        case "finding":
            machine = str(event.get("name")).partition(" on ")[2]
            where = f"on {machine}: " if machine else ""
            return f"{event.get('severity')}: {where}{event.get('what')} {event.get('todo')}"
        case "pattern":
            done = f"{event['action']}{' (shadow)' if event['shadow'] else ''}"
            return f"abuse: {event['rule']} by {event['subject']}, {event['count']} events: {done}"
    return f"over: {event.get('name')}"


def _plain(text: str) -> str:
    line = shown(text, TEXT_LIMIT)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
