"""The two faces of abuse detection: `Abuse` for threads, `AsyncAbuse` for asyncio."""

from __future__ import annotations

from stillroom.abuse.body import AbuseBody
from stillroom.abuse.rules import Rule
from stillroom.face import Service, awaiting, blocking


class Abuse(Service):
    """Events in, patterns and bans out, for threads and greenlets: `room.abuse`."""

    _body: AbuseBody

    report = blocking(AbuseBody.report)
    ban = blocking(AbuseBody.ban)
    lift = blocking(AbuseBody.lift)
    bans = blocking(AbuseBody.bans)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules in force: the built-in ones, changed and extended by STILLROOM_ABUSE_RULES."""
        return self._body.rules


class AsyncAbuse(Service):
    """Events in, patterns and bans out, for asyncio: `room.abuse`. The same names, awaited."""

    _body: AbuseBody

    report = awaiting(AbuseBody.report)
    ban = awaiting(AbuseBody.ban)
    lift = awaiting(AbuseBody.lift)
    bans = awaiting(AbuseBody.bans)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules in force: the built-in ones, changed and extended by STILLROOM_ABUSE_RULES."""
        return self._body.rules
