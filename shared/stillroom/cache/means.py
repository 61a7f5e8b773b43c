"""The parts that a cache is made of, and the place where it or one of its shards is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stillroom.cache.loaders import Loaders
from stillroom.cache.near import Store
from stillroom.cache.terms import Terms
from stillroom.dispatch import Dispatch
from stillroom.keys import Keys
from stillroom.operation import Operation
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Clock


@dataclass(frozen=True, slots=True)
class Means:
    """Hold the parts that a cache is made of. Its shards share them."""

    settings: Settings
    terms: Terms
    dispatch: Dispatch
    stats: Stats
    loaders: Loaders
    copies: Store
    wanted: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # see Calls.wanted


class Place(NamedTuple):
    """Hold the keys, the clock and the driver of a cache or of one of its shards.

    `run_aside` runs an operation where none is running.
    """

    keys: Keys
    clock: Clock
    run_aside: Callable[[Operation[Any]], Any]
