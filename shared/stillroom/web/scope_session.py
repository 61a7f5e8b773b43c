"""`request.session` of Starlette and FastAPI, for what expects a dict there: Authlib, sqladmin, starlette-admin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from typing import Any

from stillroom.errors import InvalidArgument
from stillroom.operation import Driver
from stillroom.web.request_session import AsyncWebSession, RequestSession

PATHS = 1_024  # that are remembered
STARLETTES_OWN = frozenset(["accessed", "modified"])  # of the dict that its own middleware gives
# The session's own attributes that look at its data.
LOOKING = frozenset(
    [
        *("user_id", "found", "login", "logout", "renew", "confirm"),
        *("is_fresh", "require_fresh", "mutate"),
    ]
)


class Ahead:
    """The paths whose last requests used `request.session` without having loaded it: it is read ahead for them.

    Not those of endpoints that carry limits: their check reads it along. See Gate.charging.
    """

    def __init__(self) -> None:
        self._paths: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def add(self, path: str) -> None:
        self._paths[path] = None
        while len(self._paths) > PATHS:
            self._paths.popitem(last=False)


class ScopeSession(dict[str, Any]):
    """The request's session (see AsyncWebSession) as a dict that nobody has to load.

    What was not loaded before is read by the first look at it. That holds the event loop for one round trip, so
    from then on it is read ahead for requests of this path, along with the limits of its endpoint where it carries
    some. `await load_session(request)` first is better where the code is one's own. Redis away:
    SessionStoreUnavailable, answered with 503.
    """

    _session: AsyncWebSession
    _driver: Driver
    _ahead: Ahead
    _path: str

    def __init__(self, session: AsyncWebSession, driver: Driver, ahead: Ahead, path: str) -> None:
        super().__init__()
        vars(self).update(_session=session, _driver=driver, _ahead=ahead, _path=path)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would be lost with the request. Starlette's own attributes mean nothing here."""
        if name not in STARLETTES_OWN:
            raise InvalidArgument(
                f"request.session.{name} = …: a session keeps its items, not attributes; did you mean "
                f'request.session["{name}"] = …?'
            )
        super().__setattr__(name, value)

    def mark_accessed(self) -> None:
        """Have it filled: Starlette says so when `request.session` is used. Then it is a dict to anybody."""
        self._filled()

    def _filled(self) -> AsyncWebSession:
        """Fill this dict with the session's current data."""
        session = self._session
        if not session.is_loaded:
            if not session.is_read and not session.rides:
                self._ahead.add(self._path)
            self._driver.run(session.reading())
        super().clear()
        super().update({key: session[key] for key in session})
        return session

    def __setitem__(self, key: str, value: Any) -> None:
        self._filled()[key] = value
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        del self._filled()[key]
        super().__delitem__(key)

    def __getitem__(self, key: str) -> Any:
        self._filled()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._filled()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._filled()
        return super().__iter__()

    def __len__(self) -> int:
        self._filled()
        return super().__len__()

    def __eq__(self, other: object) -> bool:
        self._filled()
        return super().__eq__(other)

    def clear(self) -> None:
        self._filled().clear()
        super().clear()

    def popitem(self) -> tuple[str, Any]:
        return self._filled().popitem()

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    # All else a dict can do, by way of these.
    get = MutableMapping.get  # type: ignore[assignment]
    pop = MutableMapping.pop
    setdefault = MutableMapping.setdefault
    update = MutableMapping.update
    keys = MutableMapping.keys  # type: ignore[assignment]
    items = MutableMapping.items  # type: ignore[assignment]
    values = MutableMapping.values  # type: ignore[assignment]
    copy = RequestSession.copy
    __ror__ = RequestSession.__ror__
    __ior__ = RequestSession.__ior__
    __reversed__ = RequestSession.__reversed__
    __reduce__ = RequestSession.__reduce__
    __ne__ = object.__ne__
    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._session)

    def __getattr__(self, name: str) -> Any:
        """Return `login`, `user_id` and the other attributes of the session itself."""
        # Nobody has to load it, and only newer releases of Starlette call `mark_accessed`.
        if name in LOOKING:
            self._filled()
        return getattr(self._session, name)
