"""FastAPI: limits as a dependency, and the session as another.

    @app.post("/login", dependencies=[Depends(limited(AUTH, count="failures"))])
    async def login(session: AsyncWebSession = Depends(load_session)): ...

Put it on a path operation, a router, an included router or the app; on websockets too. Needs StillroomMiddleware
(stillroom.web.asgi) around the app.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.requests import HTTPConnection

from stillroom.limits.routes import Counted
from stillroom.misuse import explained
from stillroom.web.carriers import GUARD, MAKES_GUARD
from stillroom.web.limited import MARK, By, Limitation, When, declared
from stillroom.web.starlette import load_session
from stillroom.web.starlette_limits import LimitExceeded, check, exempt

__all__ = ["LimitExceeded", "exempt", "limited", "load_session"]


class Charging(Protocol):
    """Is called by FastAPI, which gives a dependency its parameters by name."""

    def __call__(self, *, connection: HTTPConnection) -> Awaitable[None]:
        """Charge this request."""


@explained
def limited(
    *limits: Limitation,
    by: By = None,
    cost: int | Callable[[Any], int | Awaitable[int]] = 1,
    count: Counted = "all",
    exempt_when: When = None,
) -> Charging:
    """Return a dependency that charges limits: `Depends(limited(API, by="user"))`.

    The options are those of stillroom.web.starlette.limited. A request over a limit is answered with 429, or 503,
    before the endpoint is called: see LimitExceeded. In one declaration all limits are taken, or none; each further
    declaration is a check of its own.
    """
    declaration = declared(limits, by, cost, count, exempt_when)

    # By name, as FastAPI gives it: so `@limited(AUTH)` above an endpoint is an error, and no limit that is lost.
    async def check_limits(*, connection: HTTPConnection) -> None:
        await check(connection, declaration)

    # For the message of that error.
    check_limits.__qualname__ = "Depends(limited(…)) (the decorator is in stillroom.web.starlette)"
    setattr(check_limits, MARK, (declaration,))
    setattr(check_limits, GUARD, "limited(…)")
    return check_limits


setattr(limited, MAKES_GUARD, "limited(…)")
