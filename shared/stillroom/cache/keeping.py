"""For how long a value is kept: what was asked for, what the settings allow, and a little chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument, in_code
from stillroom.misuse import refuse_awaited
from stillroom.settings import Settings

TtlOf: TypeAlias = Callable[[Any], Duration | None]  # of a value; None: the setting's

LONGEST_NEAR_S = 60.0


def near_of(given: bool | Duration | None) -> float | None:
    """Return how old a proof of a kept copy may be, outside of requests, in seconds; None: no copy is kept.

    True is 0: copies serve requests only. Raises InvalidArgument.
    """
    if given is None or given is False:
        return None
    if given is True:
        return 0.0
    try:
        return seconds_of("near", given, most=LONGEST_NEAR_S)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error}; True serves requests only") from None


class Life(NamedTuple):
    """For how long a value is fresh, and for how long after that it is served stale; ms."""

    ttl: int
    swr: int

    @property
    def whole(self) -> int:
        return self.ttl + self.swr


class Keeping(NamedTuple):
    """Decide how long the values of one kind are kept. `life`: that of a value without a ttl of its own."""

    keeper: Keeper
    life: Life
    swr: Duration | None = None
    ttl_of: TtlOf | None = None
    keep: Callable[[Any], object] | None = None
    negative: Life | None = None

    def life_of(self, value: Any) -> Life | None:
        """Return how long this value is to be kept, with some chance in it; None: not at all."""
        if not self._is_wanted(value):
            life = self.negative
        elif self.ttl_of is None:
            life = self.life
        else:
            life = self.keeper.life(self.ttl_of(value), self.swr)
        return None if life is None else self.keeper.jittered(life)

    def _is_wanted(self, value: Any) -> bool:
        if self.keep is not None:
            return bool(self.keep(value))
        return value is not None or self.negative is None


class Keeper:
    """Reads what an app gives as times, and keeps them within the settings' limits."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def life(self, ttl: Duration | None, swr: Duration | None) -> Life:
        """Return the times of a value, None being the settings'. Raises InvalidArgument."""
        fresh = seconds_of("ttl", self._settings.ttl if ttl is None else ttl)
        stale = seconds_of("swr", self._settings.swr if swr is None else swr, least=0)
        if fresh + stale > self._settings.life_limit:
            limit = f"life_limit allows {self._settings.life_limit:,.15g} s"
            raise InvalidArgument(f"ttl + swr is {fresh + stale:,.15g} s; {limit}")
        return Life(int(fresh * 1000), int(stale * 1000))

    def keeping(
        self,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
    ) -> Keeping:
        """Return how values are kept. What can be checked without one is checked now. Raises InvalidArgument."""
        ttl_of = ttl if callable(ttl) else None
        life = self.life(None if callable(ttl) else ttl, swr)
        negative = None
        if negative_ttl is not None:
            seconds_of("negative_ttl", negative_ttl)
            negative = self.life(negative_ttl, 0)
        if ttl_of is not None:
            refuse_awaited("ttl", ttl_of)
        if keep is not None:
            if not callable(keep):
                raise InvalidArgument(
                    f"keep={in_code(keep):.100}: a function of the value that says whether to keep it"
                )
            refuse_awaited("keep", keep)
        return Keeping(self, life, swr, ttl_of, keep, negative)

    def jittered(self, life: Life) -> Life:
        """Return a life that ends a little earlier: what is stored together must not be loaded again together."""
        share = self._settings.jitter
        if not share:
            return life
        return Life(max(1, int(life.ttl * (1 - share * random.random()))), life.swr)

    def lease(self, lease: Duration | None) -> int:
        """Return how long a load may take, ms; None is the setting's. Raises InvalidArgument."""
        seconds = seconds_of("lease", self._settings.lease if lease is None else lease)
        if seconds > self._settings.lease_limit:
            limit = f"lease_limit allows {self._settings.lease_limit:,.15g} s"
            raise InvalidArgument(f"lease={seconds:,.15g} s; {limit}")
        return int(seconds * 1000)
