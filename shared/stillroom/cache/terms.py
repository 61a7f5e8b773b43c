"""Agree on what all processes of a cache must have alike: shards, replicas, the longest life, the longest lease."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from stillroom.agreed import Agreed, Rule
from stillroom.errors import RedisUnavailable
from stillroom.operation import STATE, On, Operation
from stillroom.settings import Settings

SHARDS, LEASE_LIMIT, LIFE_LIMIT = "shards", "lease_limit", "life_limit"
REPLICAS = "replicas"
SAME = (SHARDS,)  # another value is another cache


class Terms:
    """The terms of one cache, which its shards share.

    `begin_anew`: an operation that clears all shards, for when nobody knows how many were in use before.
    """

    def __init__(
        self,
        settings: Settings,
        agreed: Agreed,
        begin_anew: Callable[[], Operation[None]] | None = None,
    ) -> None:
        self._settings = settings
        self._agreed = agreed
        self._begin_anew = begin_anew
        agreed.require(SHARDS, settings.shards)
        agreed.require(REPLICAS, settings.replicas_of_cache, Rule.SMALLEST)
        agreed.require(LEASE_LIMIT, f"{settings.lease_limit:.15g}", Rule.LARGEST)
        agreed.require(LIFE_LIMIT, f"{settings.life_limit:.15g}", Rule.LARGEST)

    def agree(self) -> Operation[None]:
        """Find out whether the other processes have the same settings, where that is not known yet.

        Raises SettingsDiffer. While the state's Redis is away nobody knows, and this goes on.
        """
        if self._agreed.is_due:
            with contextlib.suppress(RedisUnavailable):
                yield On([(STATE, self._agreed.compare())])
                agreement = self._agreed.of(SHARDS)
                if self._begin_anew is not None and agreement is not None and agreement.is_new:
                    yield from self._begin_anew()
        self._agreed.check(*SAME)

    def agree_anew(self) -> Operation[None]:
        """Agree with what the state's Redis knows now: another server may know otherwise."""
        self._agreed.ask_again()
        yield from self.agree()

    def longest(self, limit: str) -> float:
        """Return a limit in seconds: this process's own, or that of the process that has the largest."""
        agreement = self._agreed.of(limit)
        own: float = getattr(self._settings, limit)
        return max(own, float(agreement.agreed)) if agreement else own

    @property
    def keep_ms(self) -> int:
        """Return the longest life of an entry and of the load before it."""
        return int((self.longest(LIFE_LIMIT) + self.longest(LEASE_LIMIT)) * 1000)

    def new_epoch(self) -> str:
        """Return how an epoch's name starts, should one have to begin: see lua/lib/clock.lua."""
        heritable = "+" if self._is_heritable else ""
        return f"{os.urandom(4).hex()}#{self._settings.shards}{heritable}"

    @property
    def _is_heritable(self) -> bool:
        """Return whether every process waits until a replica has its invalidations."""
        agreement = self._agreed.of(REPLICAS)
        return (
            self._settings.replicas_of_cache > 0
            and agreement is not None
            and agreement.agreed != "0"
        )
