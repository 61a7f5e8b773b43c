"""`request.session` of Starlette and FastAPI, for what expects a dict there: Authlib, sqladmin, starlette-admin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from typing import Any

from stillroom.operation import Driver
from stillroom.web.request_session import AsyncWebSession

PATHS = 1_024  # that are remembered


class Ahead:
    """The paths whose last requests used `request.session` without having loaded it: it is read ahead for them."""

    def __init__(self) -> None:
        self._paths: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def add(self, path: str) -> None:
        self._paths[path] = None
        while len(self._paths) > PATHS:
            self._paths.popitem(last=False)


class ScopeSession(MutableMapping[str, Any]):
    """The request's session (see AsyncWebSession) as a dict that nobody has to load.

    What was not loaded before is read by the first look at it. That holds the event loop for one round trip, so
    from then on it is read ahead for requests of this path. `await load_session(request)` first is better where the
    code is one's own. Redis away: SessionStoreUnavailable, answered with 503.
    """

    def __init__(self, session: AsyncWebSession, driver: Driver, ahead: Ahead, path: str) -> None:
        self._session = session
        self._driver = driver
        self._ahead = ahead
        self._path = path

    def __getitem__(self, key: str) -> Any:
        return self._loaded()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._loaded()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._loaded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def clear(self) -> None:
        self._loaded().clear()

    def __repr__(self) -> str:
        return repr(self._session)

    def __getattr__(self, name: str) -> Any:
        """`login`, `user_id` and the rest are those of the session itself."""
        return getattr(self._session, name)

    def _loaded(self) -> AsyncWebSession:
        if not self._session.is_loaded:
            if not self._session.is_read:
                self._ahead.add(self._path)
            self._driver.run(self._session.reading())
        return self._session
