"""The two faces of abuse detection: `Abuse` for threads, `AsyncAbuse` for asyncio."""

from __future__ import annotations

from stillroom.abuse.body import AbuseBody
from stillroom.abuse.rules import Rule
from stillroom.face import Service, awaiting, blocking


class _Face(Service):
    """The part of both faces that runs no operation."""

    _body: AbuseBody

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules in force: the built-in ones, changed and extended by STILLROOM_ABUSE_RULES."""
        return self._body.rules


class Abuse(_Face):
    """Events in, patterns and bans out, for threads and greenlets: `room.abuse`."""

    report = blocking(AbuseBody.report)
    ban = blocking(AbuseBody.ban)
    lift = blocking(AbuseBody.lift)
    bans = blocking(AbuseBody.bans)


class AsyncAbuse(_Face):
    """Events in, patterns and bans out, for asyncio: `room.abuse`. The same names, awaited."""

    report = awaiting(AbuseBody.report)
    ban = awaiting(AbuseBody.ban)
    lift = awaiting(AbuseBody.lift)
    bans = awaiting(AbuseBody.bans)
