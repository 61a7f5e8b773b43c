"""Quota that was consumed before the work, and may be given back after it. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from stillroom.keys import home_of
from stillroom.limits.decision import Decision
from stillroom.limits.limit import Limit


@dataclass(frozen=True, slots=True)
class Reservation:
    """Quota that was consumed and may be given back, once: see `reserve`. True if there was enough."""

    decision: Decision
    keys: tuple[bytes, ...]
    id: str = ""
    at_us: int = 0  # the server's clock; 0: this process decided
    local: bool = False  # made while Redis was away
    counted: tuple[Limit, ...] = ()  # the limit of each key
    may_be_known: bool = False  # Redis was asked, and may have consumed it as well

    def __bool__(self) -> bool:
        return self.decision.allowed

    @property
    def allowed(self) -> bool:
        """Return whether there was enough, as the reservation's truth does."""
        return self.decision.allowed

    def of(self, limits: Container[Limit]) -> Reservation:
        """Return the part of the reservation that these limits hold, to settle it there and nowhere else, once."""
        pairs = zip(self.keys, self.counted, strict=True)
        return self._with([pair for pair in pairs if pair[1] in limits])

    def by_home(self) -> dict[bytes, Reservation]:
        """Return what each shard of a cluster has of it; one server has all of it."""
        homes: dict[bytes, list[tuple[bytes, Limit]]] = {}
        for key, limit in zip(self.keys, self.counted, strict=True):
            homes.setdefault(home_of(key), []).append((key, limit))
        if len(homes) <= 1:
            return {next(iter(homes), b""): self}
        return {home: self._with(pairs) for home, pairs in homes.items()}

    def _with(self, pairs: Sequence[tuple[bytes, Limit]]) -> Reservation:
        keys, counted = tuple([key for key, _ in pairs]), tuple([limit for _, limit in pairs])
        return replace(self, keys=keys, counted=counted)
