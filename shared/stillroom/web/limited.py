"""Holds the limits that an endpoint declares, and what they charge one request.

It needs neither a framework nor Redis.

The declaration is put on an endpoint by the framework's own means: see starlette.py, fastapi.py, flask.py and
django/limits.py. So the framework says which endpoint a path means, and nobody else has an opinion.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

from stillroom.errors import InvalidLimit, SettingsError, did_you_mean
from stillroom.limits import Limit
from stillroom.limits.limit import check_cost, check_limits
from stillroom.limits.request import Subject
from stillroom.limits.routes import Counted, check_count, check_plain, check_takes_one
from stillroom.misuse import name_of

if TYPE_CHECKING:
    from stillroom.web.visit import Visit

T = TypeVar("T")
# The result of a function of the request is yielded, because in an ASGI app it may have to be awaited.
Steps: TypeAlias = Generator[Any, Any, T]
LimitsOf: TypeAlias = Callable[[Any], Limit | Sequence[Limit] | Awaitable[Limit | Sequence[Limit]]]

MARK = "__stillroom_limits__"  # on an endpoint: the declarations it carries
EXEMPT = "__stillroom_exempt__"  # on an endpoint: outer limits do not count here
# The attributes by which a function may be exempt.
_SAYS_EXEMPT = frozenset([EXEMPT, "view_class", "cls"])
KINDS = ("ip", "user")  # that every request has; "user" is the session's, None for a visitor
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_HEADER = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # RFC 9110, section 5.6.2


class Answered(NamedTuple):
    """A response, as far as it decides whether its request counts."""

    status: int
    headers: Mapping[str, str]  # names in small letters


class Header(NamedTuple):
    """`by=Header("X-API-Key")`: a request is counted by this header; one without it, by its address.

    A client that makes up a new key for each request has a new quota for each. So add a limit by address, or give
    a function that returns only keys you know.
    """

    name: str


class Here:
    """A request, as a framework shows it."""

    def __init__(self, request: Any, visit: Visit) -> None:
        self.request = request  # the argument of functions of the request
        self._visit = visit

    def address(self) -> str:
        """Return the client's address, as `limits.client` makes it."""
        return self._visit.client

    def header(self, name: str) -> str | None:
        value: str | None = self.request.headers.get(name)
        return value

    def user(self) -> Any:
        """Return the user who is logged in, or an awaitable of that; None: nobody."""
        raise NotImplementedError


# The arguments of `limited`.
Limitation: TypeAlias = Limit | Sequence[Limit] | LimitsOf
By: TypeAlias = str | Header | Callable[[Any], object] | None
When: TypeAlias = Callable[[Any], object] | None

ALL: tuple[Counted, ...] = ()  # every answer counts


class Charge(NamedTuple):
    """Hold the limits that one request is to be charged by, its subject and its cost."""

    limits: tuple[Limit, ...]
    subject: Subject
    cost: int = 1
    counted: tuple[Counted, ...] = ALL  # which answers count, for each limit


@dataclass(frozen=True, slots=True, eq=False)
class Limited:
    """Limits that an endpoint carries. Raises InvalidLimit for what can't be meant."""

    limits: tuple[Limit, ...] | LimitsOf
    by: str | Header | Callable[[Any], Any] | None = None
    cost: int | Callable[[Any], Any] = 1
    count: Counted = "all"
    exempt_when: Callable[[Any], Any] | None = None
    # The charge of a client without an address, where nothing else matters of a request.
    _plain: Charge | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.limits, tuple):
            known = (*KINDS, *([kind_of(self.by)] if self.by else ()))
            _check_kinds(self.limits, self.by, known)
        _check_by(self.by)
        _check_when(self.exempt_when)
        for name in ("limits", "by", "cost", "exempt_when"):
            check_takes_one(name, getattr(self, name))
        if not callable(self.cost):
            check_cost(self.cost)
        check_count(self.count)
        object.__setattr__(self, "_plain", self._as_plain())

    def _as_plain(self) -> Charge | None:
        limits, cost = self.limits, self.cost
        if not isinstance(limits, tuple) or callable(cost) or not limits:
            return None
        if self.by is not None or self.exempt_when is not None or not _by_ip(limits):
            return None
        return Charge(limits, "", cost, counted_by(self.count, limits))

    def at_once(self, client: str) -> Charge | None:
        """Return the charge for this client's address. None: it takes more than that to know, see `of`."""
        if self._plain is None:
            return None
        limits, _, cost, counted = self._plain
        return Charge(limits, client, cost, counted)

    def of(self, here: Here) -> Steps[Charge | None]:
        """Return the charge for this request; None: there is nothing to charge."""
        request = here.request
        if self.exempt_when is not None and (yield self.exempt_when(request)):
            return None
        limits = self.limits
        if not isinstance(limits, tuple):
            found = yield limits(request)
            if found is None:  # a branch without a return, or a tier that is not in the table
                raise InvalidLimit(
                    name_of(limits), "it returned None; return limits, or [] for none"
                )
            limits = check_limits([found] if isinstance(found, Limit) else found)
        if not limits:
            return None
        limits, subject = yield from self._counted(limits, here)
        cost = self.cost
        if callable(cost):
            cost = yield cost(request)
            check_cost(cost)
        return Charge(limits, subject, cost, counted_by(self.count, limits))

    def _counted(
        self, limits: tuple[Limit, ...], here: Here
    ) -> Steps[tuple[tuple[Limit, ...], Subject]]:
        """Return the limits with their kinds here, and their subjects."""
        if self.by is None and _by_ip(limits):
            return limits, here.address()
        subject: dict[str, str | None] = {"ip": here.address()}
        by = self.by
        if isinstance(by, Header):
            subject[kind_of(by)] = here.header(by.name)
        elif by is not None and not isinstance(by, str):
            given = yield by(here.request)
            if isinstance(given, Mapping):
                subject |= {kind: _text(value) for kind, value in given.items()}
                by = None
            else:
                subject[kind_of(by)] = _text(given)
        if by is not None:
            kind = by if isinstance(by, str) else kind_of(by)
            limits = tuple([replace(limit, by=kind) for limit in limits])
        if any("user" in limit.kinds for limit in limits) and "user" not in subject:
            subject["user"] = yield here.user()
        return limits, subject


def declared(
    limits: Sequence[Any], by: By, cost: Any, count: Counted, exempt_when: When
) -> Limited:
    """Return the declaration in `limited(*limits, …)`: limits, one list of them, or one function of the request."""
    if len(limits) == 1 and callable(limits[0]):
        return Limited(limits[0], by, cost, count, exempt_when)
    if len(limits) == 1 and isinstance(limits[0], list | tuple):
        limits = limits[0]
    if not limits:
        raise InvalidLimit(
            "limited()", "it needs limits, as in limited(AUTH) or limited(DEFAULT, API)"
        )
    return Limited(check_limits(limits), by, cost, count, exempt_when)


def declared_in_threads(
    limits: Sequence[Any], by: By, cost: Any, count: Counted, exempt_when: When
) -> Limited:
    """Return the declaration as `declared` does, for a framework that awaits none of its functions."""
    for limit in limits:
        check_plain("limits", limit)
    for name, given in (("by", by), ("cost", cost), ("exempt_when", exempt_when)):
        check_plain(name, given)
    return declared(limits, by, cost, count, exempt_when)


def counted_by(count: Counted, limits: Sequence[Limit]) -> tuple[Counted, ...]:
    """Return which answers count, for each of the limits."""
    return ALL if count == "all" else (count,) * len(limits)


def carried(endpoint: object) -> tuple[Limited, ...]:
    """Return the declarations that an endpoint carries."""
    return getattr(endpoint, MARK, ())


def exempted(endpoint: T) -> T:
    """Mark an endpoint as exempt. Raises InvalidLimit for what holds endpoints, where nobody looks for the mark."""
    function = getattr(endpoint, "__func__", endpoint)  # on a bound method nothing can be set
    if not callable(function) or hasattr(function, "routes") or hasattr(function, "url_map"):
        why = "@exempt is put on an endpoint, or a class of them"
        raise InvalidLimit(endpoint, f"{why}; for several put it on each, or give exempt_when=")
    setattr(function, EXEMPT, True)
    return endpoint


def is_exempt(endpoint: object) -> bool:
    """Return whether an endpoint, or the class that it was made of, is free from limits further out.

    Those that it carries itself count all the same: whoever put both there meant both. A subclass of an exempt
    class is not exempt by that.
    """
    if type(endpoint) is FunctionType and _SAYS_EXEMPT.isdisjoint(vars(endpoint)):
        return False  # as nearly always
    made_of = getattr(endpoint, "view_class", None) or getattr(endpoint, "cls", None)
    return _bears_exempt(endpoint) or (made_of is not None and _bears_exempt(made_of))


def _bears_exempt(one: object) -> bool:
    """Return whether a view was exempted itself, or by its class. What its class extends does not count."""
    if isinstance(one, type):
        return EXEMPT in vars(one)
    if EXEMPT in getattr(one, "__dict__", ()) or EXEMPT in vars(type(one)):
        return True
    return not hasattr(type(one), EXEMPT) and bool(getattr(one, EXEMPT, False))


def run(steps: Steps[T]) -> T:
    """Take the steps in a thread. Raises SettingsError for a coroutine function."""
    try:
        value = next(steps)
        while True:
            if inspect.isawaitable(value):
                if inspect.iscoroutine(value):
                    value.close()
                raise SettingsError(
                    "a coroutine function says how to limit a request that no event loop serves"
                )
            value = steps.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def run_async(steps: Steps[T]) -> T:
    """Take the steps in a task."""
    try:
        value = next(steps)
        while True:
            value = steps.send(await value if inspect.isawaitable(value) else value)
    except StopIteration as stop:
        result: T = stop.value
        return result


def _by_ip(limits: Sequence[Limit]) -> bool:
    return all(limit.by == "ip" for limit in limits)


def kind_of(by: object) -> str:
    """Return the kind under which the names of a function or a header are counted."""
    name = by.name if isinstance(by, Header) else getattr(by, "__name__", "")
    kind = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:32]
    return kind if _NAME.fullmatch(kind) and kind not in KINDS and kind != "lambda" else "given"


def _check_when(given: object) -> None:
    if given is not None and not callable(given):
        why = "exempt_when= is a function of the request: whether it is not counted"
        raise InvalidLimit(given, why)


def _check_by(by: object) -> None:
    if isinstance(by, Header) and not _is_header(by.name):
        raise InvalidLimit(by.name, "a header's name has letters, digits and -, as in X-API-Key")
    if by is None or isinstance(by, Header) or callable(by):
        return
    unknown = [kind for kind in str(by).split("&") if kind not in KINDS]
    if unknown:
        is_header = "-" in str(by) and _is_header(by)
        near = did_you_mean(unknown[0].lower(), KINDS)
        hint = f"; did you mean Header({by!r})?" if is_header else near
        raise InvalidLimit(
            by,
            "by= is ip, user, ip&user, a Header(…), or a function of the request that says whom to count"
            f"{hint}",
        )


def _is_header(name: object) -> bool:
    return isinstance(name, str) and _HEADER.fullmatch(name) is not None


def _check_kinds(limits: Sequence[Limit], by: object, known: Sequence[str]) -> None:
    """Raise for a limit by a kind that no request has, which would raise at each request."""
    if by is not None:
        return
    for limit in limits:
        if missing := [kind for kind in limit.kinds if kind not in known]:
            raise InvalidLimit(
                limit.name,
                f"it counts by {missing[0]}, which no request has by itself: give by=, a function of the request "
                f"that returns {{{missing[0]!r}: …}}",
            )


def _text(value: object) -> str | None:
    """Return a subject's name as text. Raises InvalidLimit for another type, and does not repeat it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    raise InvalidLimit(
        type(value).__name__, "a subject is a str, an int, a UUID, or None for nobody"
    )
