"""Decides without Redis, or without one of its shards: by what this process has counted and heard."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from stillroom.counted import LIMIT
from stillroom.errors import RedisUnavailable, is_misconfigured
from stillroom.keys import Keys
from stillroom.known_bans import KnownBans
from stillroom.limits.asking import Asking
from stillroom.limits.decision import TOO_MANY, UNAVAILABLE, Decision
from stillroom.limits.flying import Flying
from stillroom.limits.limit import Limit
from stillroom.limits.local import LocalLimits
from stillroom.limits.request import Request
from stillroom.limits.reservation import Reservation
from stillroom.limits.settling import Settling, now_us
from stillroom.oldest import oldest
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Breaker, Breakers, Server, StateServer, reset_after_fork

TRY_AGAIN_US = 1_000_000  # Redis is looked for about this often
SETTLED_KNOWN = 1_000  # settlements that still correct what Redis said before them


class WithoutRedis(Asking):
    """Decide about a request by what this process knows."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        breaker: Breaker | Breakers,
        keys: Keys,
        stats: Stats,
        bans: KnownBans,
    ) -> None:
        super().__init__(settings, server, breaker, keys, stats)
        self._bans = bans
        self._local = LocalLimits(settings.processes, settings.local_limits, settings.limits_memory)
        self._settling = Settling(settings, keys, self._requests, self._local, stats)
        self._flying = Flying()
        # What Redis has settled, at which cost and when, but for these logs: looked at only once it is away.
        self._settled_since: deque[tuple[Reservation, int, int, Collection[bytes]]] = deque(
            maxlen=SETTLED_KNOWN
        )
        self._corrected: dict[tuple[str, bytes], None] = {}
        reset_after_fork(self._local)
        reset_after_fork(self._flying)
        reset_after_fork(self._settling)

    def _stand_in(
        self, request: Request, error: RedisUnavailable, *, take: bool, id: str = ""
    ) -> Decision:
        """Return this process's own decision."""
        limits, reason, now_us = request.limits, error.reason, self._server.now_us()
        if take:
            self._tell_of_degraded(limits, [error])
        if left_ms := self._banned_ms(request, now_us // 1_000):
            wait_us = left_ms * 1_000
            return Decision(
                limits, TOO_MANY, request.cost, now_us, wait_us=wait_us, degraded=reason
            )
        if take:
            self._settling.was_away(request.home, reason)
        mistaken = is_misconfigured(error)
        status, said = self._decide_here(request, take=take, id=id, mistaken=mistaken)
        wait_us = TRY_AGAIN_US if status == UNAVAILABLE else 0
        return Decision(
            *(limits, status, request.cost, now_us, request.folded(said)),
            wait_us=wait_us,
            degraded=reason,
        )

    def _tell_of_degraded(
        self, limits: Iterable[Limit], errors: Sequence[RedisUnavailable]
    ) -> None:
        """Count and log a decision about these limits without Redis, or without some of its shards."""
        for error in errors[:1]:
            self.stats.counts["limit_degraded"] += 1
            for limit in limits:
                self.stats.counts[self.stats.counted_as(LIMIT, "degraded", limit.name)] += 1
            self.stats.say("limits", error.reason, f"decided without Redis: {error}")
        for error in filter(is_misconfigured, errors):
            self.stats.mistaken(error.reason if error.reason != "breaker" else error.detail)

    def _banned_ms(self, request: Request, now_ms: int) -> int:
        """Return how long this machine knows the client as banned, in ms; 0 if it does not."""
        self._bans.look()
        if not request.bans or not self._bans.until:
            return 0
        networks = self._requests.bans_of(request.address, self._bans.widths)
        return self._bans.left_ms([*request.bans, *networks], now_ms)

    def _decide_here(
        self, request: Request, *, take: bool, id: str, mistaken: bool
    ) -> tuple[int, tuple[int, ...]]:
        """Decide by what this process knows. `mistaken`: the configuration keeps Redis from deciding.

        That does not end by itself as an outage does, and a share of the quota in each process, for as long as it
        lasts, is more than the quota. So what is strict is refused then.
        """
        limits = request.limits
        if (mistaken or self.settings.limits_strict_503) and any(
            limit.away == "strict" and not limit.shadow for limit in limits
        ):
            return UNAVAILABLE, ()
        if take:
            self.stats.remind()
        for _ in range(len(self._settled_since)):
            with suppress(IndexError):  # other threads take some
                self._correct(*self._settled_since.popleft())
        return self._local.decide(
            *(request.logs, request.counted, request.cost, now_us()),
            take=take,
            id=id,
            flying=self._flying.hits(request.logs, but=id),
            known=request.known_as,
        )

    def _correct(
        self, reservation: Reservation, cost: int, sent_ns: int, own: Collection[bytes]
    ) -> None:
        """Correct what Redis said of these logs before it has settled a reservation.

        Redis settles it once. Of two calls that may both not know what became of that, the first counts. In its
        `own` logs this process has counted the hits itself, beside what Redis said, and has taken them off there.
        """
        names, known_as = self._known_as(reservation), []
        for key, limit in zip(reservation.keys, reservation.counted, strict=True):
            if key not in own and (reservation.id, key) not in self._corrected:
                self._corrected[reservation.id, key] = None
                known_as.append((names[key], limit))
        for one in oldest(self._corrected, max(0, len(self._corrected) - SETTLED_KNOWN)):
            self._corrected.pop(one, None)
        more = cost - reservation.decision.cost
        self._local.correct(known_as, more, sent_ns // 1_000, reservation.at_us)

    def _known_as(self, reservation: Reservation) -> Mapping[bytes, bytes]:
        """Return by log the name under which this process remembers what Redis said of it."""
        pairs = zip(reservation.keys, reservation.counted, strict=True)
        return {key: self._requests.known_as(key, limit) for key, limit in pairs}
