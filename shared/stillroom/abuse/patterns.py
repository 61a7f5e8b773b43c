"""Turns events into counts, and full counts into patterns of abuse. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from stillroom.abuse.event import Entry
from stillroom.abuse.rules import Rule
from stillroom.subject import site_of


class Sample(NamedTuple):
    """One event as one rule counts it: for which group, and as which member of the group's count.

    A sample without a member only looks at the count. A member is counted once, however often it is seen: an event
    read twice is still one event.
    """

    rule: Rule
    group: str
    member: bytes
    entry: Entry

    @property
    def claim(self) -> str:
        """Return the name under which a pattern is reported once per window.

        It is the group. For a rule with `then` (a break-in) it is the group and the user: each account counts by
        itself.
        """
        user = self.entry.event.user if self.rule.then else ""
        return self.group if user in ("", self.group) else f"{self.group} {user}"

    @property
    def needs(self) -> int:
        """Return how many events of this kind the address needs of its own: see Rule.each."""
        return self.rule.needs(self.entry.event)

    @property
    def own(self) -> Sample:
        """Return the sample that counts the address by itself: its different pages or tokens, or its events."""
        event = self.entry.event
        text = event.route if event.kind == "not_found" else event.token
        rule = self.rule.model_copy(update={"threshold": self.needs})
        member = text.encode() or self.entry.id
        return Sample(rule, f"{event.ip} {event.kind}", member, self.entry)


class Tally(NamedTuple):
    """Holds how far one rule has counted for one group. Below the rule's threshold only the total is known."""

    total: int
    first_ms: int
    last_ms: int
    newest: tuple[str, ...]  # a few of the members

    @classmethod
    def read(cls, reply: Sequence[Any]) -> Tally:
        """Return the tally in a reply of lua/abuse_count.lua."""
        total, first, last, *newest = reply if len(reply) > 1 else (*reply, 0, 0)
        return cls(int(total), int(first), int(last), tuple(one.decode() for one in newest))


class Finding(NamedTuple):
    """The sample that completed a pattern, and how far its rule had counted."""

    sample: Sample
    tally: Tally


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern of abuse that was found.

    `action`: log; ban; already (it is banned); capped (too many bans this minute); lifted (somebody has just lifted
    its ban); exempt (it is never banned). With `shadow` it is what would have been done. Times: seconds since 1970.
    """

    rule: str
    why: str
    group_by: str
    subject: str  # an address, a network, or a user's HMAC
    count: int
    threshold: int
    distinct: str
    window: int
    first: float
    last: float
    user: str  # of the event that completed it
    route: str
    examples: tuple[str, ...]
    action: str
    shadow: bool
    level: int  # how many bans it has had before
    ban_seconds: float
    event: str  # the id, in the stream, of the event that completed it

    def line(self) -> str:
        """Return one line of JSON: printable ASCII, whatever a client has sent."""
        return json.dumps(asdict(self), ensure_ascii=True, separators=(", ", ": "))

    def fields(self) -> list[bytes]:
        """Return the fields known before a ban is decided, as XADD takes them."""
        judged = ("action", "level", "ban_seconds", "why")
        known = {name: _text(value) for name, value in asdict(self).items() if name not in judged}
        return [part.encode() for item in known.items() for part in item]

    def judged(self, action: str, level: int, ban_ms: int) -> Pattern:
        return replace(self, action=action, level=level, ban_seconds=ban_ms / 1000)


def samples_of(rules: Iterable[Rule], entry: Entry) -> list[Sample]:
    """Return a sample for each rule that this event concerns."""
    found = [sample for rule in rules if (sample := _sample(rule, entry))]
    return [sample for sample in found if sample.group]


def findings(samples: Sequence[Sample], tallies: Sequence[Tally]) -> list[Finding]:
    """Return the first sample of each claim that met a full count, with the count as it is now.

    It is the first one, because an event that is read again by itself must come to the same claim.
    """
    found: dict[tuple[str, str], Finding] = {}
    for sample, tally in zip(samples, tallies, strict=True):
        complete = sample.rule.then is None or not sample.member
        if complete and tally.total >= sample.rule.threshold:
            name = sample.rule.name, sample.claim
            first = found[name].sample if name in found else sample
            found[name] = Finding(first, tally)
    return list(found.values())


def pattern_of(finding: Finding, action: str) -> Pattern:
    """Return the pattern that a finding completed, with the action to take."""
    (rule, group, _, entry), tally = finding
    return Pattern(
        rule=rule.name,
        why=rule.why,
        group_by=rule.group_by,
        subject=group,
        count=tally.total,
        threshold=rule.threshold,
        distinct=rule.distinct,
        window=rule.window,
        first=tally.first_ms / 1000,
        last=tally.last_ms / 1000,
        user=entry.event.user,
        route=entry.event.route,
        examples=tally.newest if rule.distinct != "none" else (),
        action=action,
        shadow=rule.shadow and rule.action == "ban",
        level=0,
        ban_seconds=0.0,
        event=entry.id.decode(),
    )


def _sample(rule: Rule, entry: Entry) -> Sample | None:
    event = entry.event
    if event.kind == rule.then:
        return Sample(rule, rule.group_of(event), b"", entry)
    if not rule.counts(event):
        return None
    member = _member(rule, entry)
    return Sample(rule, rule.group_of(event), member, entry) if member else None


def _member(rule: Rule, entry: Entry) -> bytes:
    if rule.consecutive:
        return b"%d" % (entry.ms // (rule.window * 1000))
    match rule.distinct:
        case "user":
            return entry.event.user.encode()
        case "ip":
            return entry.event.ip.encode()
        case "route":
            return entry.event.route.encode()
        case "token":
            # An app that reports without a token counts each time.
            return entry.event.token.encode() or entry.id
        case "network":
            return (site_of(entry.event.ip) or entry.event.ip).encode()
    return entry.id


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
