"""Many calls at once, of one loader or of several: what is there is looked up together, and the rest is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from stillroom.cache.calls import UNREAD, Asked, Unread
from stillroom.cache.loaders import Loader
from stillroom.codec import MISS
from stillroom.operation import AsyncDriver, Driver, Operation
from stillroom.wire import side_by_side

LOADS_AT_ONCE = 10  # of one loader, in asyncio


class Gathering:
    """The calls, and their values, with Unread in the place of those that have none yet."""

    def __init__(self, body: Any, calls: Sequence[Asked]) -> None:
        self._body = body
        self._calls = calls
        nears = [call.loader.near for call in calls]
        self.values: list[Any] = [UNREAD] * len(calls)
        if nears.count(None) < len(calls):
            self.values = [self._kept(call) for call in calls]

    def _kept(self, call: Asked) -> Any:
        """Return the value that this process keeps."""
        if call.loader.near is None or call.kwargs:
            return UNREAD
        value = self._body.copies.of_call(call.loader, call.args)
        return UNREAD if value is MISS else value

    def unread(self) -> Sequence[int]:
        """Return the places of the calls that have no value yet."""
        left = list(map(type, self.values)).count(Unread)
        if left in (0, len(self.values)):
            return range(left)
        return [place for place, value in enumerate(self.values) if type(value) is Unread]

    def looking(self, places: Sequence[int]) -> Operation[list[Any]]:
        """Return the operation that looks up the calls in these places."""
        calls = self._calls
        if len(places) < len(calls):
            calls = [calls[place] for place in places]
        return self._body.call_many(calls)  # type: ignore[no-any-return]

    def take(self, places: Sequence[int], found: Sequence[Any]) -> None:
        """Take what was found for the calls in these places."""
        if len(places) == len(self.values):
            self.values = list(found)
            return
        for place, value in zip(places, found, strict=True):
            self.values[place] = value

    def loading(self, place: int) -> Operation[Any]:
        """Return the operation that makes the call in this place by itself."""
        return self._body.call(*self._calls[place], self.values[place].away)  # type: ignore[no-any-return]

    def loader(self, place: int) -> Loader:
        """Return the loader of the call in this place."""
        return self._calls[place].loader


def gather(body: Any, driver: Driver, calls: Sequence[Asked]) -> list[Any]:
    """Return the values of these calls. An error of a loader leaves those behind it unloaded."""
    gathering = Gathering(body, calls)
    if places := gathering.unread():
        gathering.take(places, driver.run(gathering.looking(places)))
        for place in gathering.unread():
            gathering.values[place] = driver.run(gathering.loading(place))
    return gathering.values


async def gather_async(body: Any, driver: AsyncDriver, calls: Sequence[Asked]) -> list[Any]:
    """Return the values of these calls. Missing ones are loaded side by side; the first error is raised at last."""
    gathering = Gathering(body, calls)
    if places := gathering.unread():
        gathering.take(places, await driver.run(gathering.looking(places)))
        if places := gathering.unread():
            await _load(gathering, driver, places)
    return gathering.values


async def _load(gathering: Gathering, driver: AsyncDriver, places: Sequence[int]) -> None:
    loaders = {gathering.loader(place) for place in places}
    turns = {loader: asyncio.Semaphore(loader.at_once or LOADS_AT_ONCE) for loader in loaders}

    async def load(place: int) -> None:
        async with turns[gathering.loader(place)]:
            gathering.values[place] = await driver.run(gathering.loading(place))

    await side_by_side(map(load, places))
