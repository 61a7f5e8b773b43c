"""Arguments that are almost right are taken as they are meant, or refused with what is allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address, ip_network
from typing import Any, Protocol, TypedDict

import pytest

from stillroom import (
    InvalidArgument,
    InvalidLimit,
    Limit,
    NoDispatch,
    Stillroom,
    StillroomError,
)
from stillroom.integrations.sqlalchemy import AfterCommit
from stillroom.web.placing import checked_view


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (ip_address("8.8.8.8"), "8.8.8.8"),
        (ip_address("::ffff:8.8.8.8"), "8.8.8.8"),
        (ip_address("2001:4860::1"), "2001:4860::/64"),
        (ip_network("8.8.8.0/24"), "8.8.8.0/24"),
        (ip_network("8.8.8.8/32"), "8.8.8.8"),
        (ip_network("2001:4860::/48"), "2001:4860::/48"),
    ],
)
def test_an_address_object_is_banned_and_lifted_as_its_text(
    room: Any, given: Any, name: str
) -> None:
    """An address or a network of `ipaddress` is banned, and its ban lifted, as its text is."""
    assert room.abuse.ban(given, 60).subject == name
    assert room.abuse.lift(given)
    room.abuse.ban(str(given), 60)
    assert room.abuse.lift(given)
    assert not room.abuse.lift(given)


@pytest.mark.parametrize("given", [ip_address("8.8.8.8"), ip_address("2001:4860::1")])
def test_an_address_object_is_reported_as_its_text(room: Any, client: Any, given: Any) -> None:
    """An event of an address of `ipaddress` is an event of its text."""
    for ip in (given, str(given)):
        assert room.abuse.report("auth_fail", ip=ip)
    one, other = [fields for _, fields in client.xrange(room.keys.abuse)]
    assert one == other


class Unshowable:
    """A thing whose own code fails when it is to be shown."""

    def __repr__(self) -> str:
        raise LookupError


DEEP = functools.reduce(lambda inner, _: [inner], range(5_000), list[Any]())


@pytest.mark.parametrize("given", [DEEP, [Unshowable()]], ids=["deep", "unshowable"])
@pytest.mark.parametrize(
    "call",
    [
        lambda room, given: room.cache.get(given),
        lambda room, given: room.cache.get("k", given),
        lambda room, given: room.cache.get_or_set("k", given),
        lambda room, given: room.cache.get_or_set("k", int, keep=given),
        lambda room, given: room.cache.gather(given),
        lambda room, given: room.cache.incr("k", by=given),
        lambda room, given: room.cache.invalidate("k", defer=given),
        lambda room, given: room.cache.set("k", 1, ttl=given),
        lambda room, given: room.cache.set_many(given),
        lambda room, given: room.cache.get_image_info(given),
        lambda room, given: room.tasks.load(given),
        lambda room, given: room.cache.cached("k")(given),
        lambda room, given: room.cache.cached("k", at_once=given)(lambda: 1),
        lambda room, given: room.cache.cached("k", name=given)(lambda: 1),
        lambda room, given: room.upkeep.pause(given, 60),
        lambda room, given: room.sessions.create("u", {}, meta=given),
        lambda room, given: room.sessions.create("u", {}, max_per_user=given),
        lambda room, given: room.sessions.create("u", {}, on_cap=given),
        lambda room, given: room.sessions.list_for_user("u", limit=given),
        lambda room, given: room.health.history(given),
        lambda room, given: room.health.figures(given),
        lambda room, given: room.abuse.bans(limit=given),
        lambda _, given: checked_view(given, "@fresh(…)"),
        lambda _, given: AfterCommit(Stillroom(dispatch=NoDispatch())).watch(given),
    ],
)
def test_what_can_not_be_shown_is_refused_as_anything_else(
    room: Any, call: Callable[[Any, Any], object], given: Any
) -> None:
    """An argument of a wrong kind is refused in words, also where Python can't write it down."""
    with pytest.raises(StillroomError, match=r"<list>"):
        call(room, given)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda room: room.abuse.report("auth_fail", user=42), "user is text, not int"),
        (lambda room: room.abuse.report("auth_fail", ip=b"8.8.8.8"), "ip is text, not bytes"),
        (lambda room: room.abuse.report("not_found", ip="8.8.8.8", route=1), "route is text"),
        (lambda room: room.abuse.report("auth_fail", ip="8.8.8.8", token=b"t"), "token is text"),
        (lambda room: room.abuse.ban("8.8.8.8", 60, None), "reason is text, not NoneType"),
        (lambda room: room.health.history(float("nan")), "hours=nan: a number"),
        (lambda room: room.health.history(float("inf")), "hours=inf: a number"),
        (lambda room: room.health.figures(1.5), "minutes=1.5: a whole number from 1 to 119"),
        (lambda room: room.health.figures("15"), "minutes='15'"),
    ],
)
def test_abuse_and_health_say_what_is_allowed(
    room: Any, client: Any, call: Callable[[Any], Any], sentence: str
) -> None:
    """What can't be meant is refused in words, and nothing is written. What may be a name is not repeated."""
    with pytest.raises(InvalidArgument, match=sentence) as refused:
        call(room)
    assert "42" not in str(refused.value)
    assert client.keys("*") == []


@pytest.mark.parametrize("cost", [True, 1.0, "1", None])
@pytest.mark.parametrize("subject", ["8.8.8.8", {"user": "ann"}])
def test_a_cost_that_equals_a_number_is_refused_each_time(
    room: Any, cost: Any, subject: Any
) -> None:
    """A cost that is no whole number is refused, also behind an equal one that was right."""
    limits = [Limit("odd-cost", 5, 60, by="ip" if isinstance(subject, str) else "user")]
    room.limits.check(subject, limits, 1)
    with pytest.raises(InvalidLimit, match="cost is a whole number"):
        room.limits.check(subject, limits, cost)
    assert room.limits.peek(subject, limits).remaining == 4


@pytest.mark.parametrize("route", [7, b"/login", ["/login"]])
@pytest.mark.parametrize("subject", ["8.8.8.8", {"ip": "8.8.8.8"}])
def test_a_route_is_text(room: Any, client: Any, subject: Any, route: Any) -> None:
    """A route that is no text is refused in words, and the request is not counted."""
    with pytest.raises(InvalidArgument, match=r"route=.*: the template of the path, as text"):
        room.limits.check(subject, [Limit("odd-route", 5, 60)], route=route)
    assert not client.keys("*odd-route*")


@pytest.mark.parametrize("call", ["check", "wait", "reserve", "peek"])
def test_limits_that_can_be_read_once_count(room: Any, call: str) -> None:
    """Limits that an iterator gives deny as those of a list do, also where each try of a wait reads them."""
    limit = Limit("once", 1, 60)
    assert room.limits.check("8.8.8.8", iter([limit]))
    options = {"timeout": 0} if call == "wait" else {}
    assert not getattr(room.limits, call)("8.8.8.8", iter([limit]), **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s, _: s.create("ann", tags=None), "tags=None: a text, or a list of them"),
        (lambda s, _: s.create("ann", tags=b"a"), "tags=b'a': a text, or a list of them"),
        (lambda s, _: s.create("ann", meta="phone"), "meta='phone': a mapping"),
        (lambda s, _: s.create("ann", device=7), "device=7: the text that names the user's device"),
        (lambda s, of: s.update(of, remove=5), "remove=5: a text, or a list of them"),
        (lambda s, of: s.mutate(of, None), r"mutate\(…, None\): a function"),
    ],
)
def test_sessions_say_what_is_allowed(
    room: Any, call: Callable[[Any, Any], Any], sentence: str
) -> None:
    """What can't be tags, keys or a change of a session is refused in words, and nothing is written."""
    session = room.sessions.create("ann", {"n": 1})
    with pytest.raises(InvalidArgument, match=sentence):
        call(room.sessions, session)
    assert room.sessions.get(session.token).version == session.version


FLAGS: dict[str, Callable[..., Any]] = {
    "touch": lambda room, given: room.sessions.get("", touch=given),
    "defer": lambda room, given: room.sessions.destroy("", defer=given),
    "meant": lambda room, given: room.limits.check("8.8.8.8", [Limit("odd", 5, 60)], meant=given),
    "loads": lambda room, given: room.upkeep.reclaim(loads=given),
}


@pytest.mark.parametrize("given", ["no", None, 0, []])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_true_or_false(room: Any, client: Any, flag: str, given: Any) -> None:
    """What is neither True nor False is refused at the call: the text "no" would be taken for yes."""
    with pytest.raises(InvalidArgument, match=rf"^{flag}=.*: True or False"):
        FLAGS[flag](room, given)
    assert client.keys("*odd*") == []
    for right in (True, False):
        FLAGS[flag](room, right)


@pytest.mark.parametrize("given", [{}, 5, "dict"])
def test_a_type_of_a_session_is_looked_at_without_one_too(room: Any, given: Any) -> None:
    """What is no type is refused where there is no session to be read, and before a session gets a new token."""
    session = room.sessions.create("ann", {"n": 1})
    for token in ("", "00." + "a" * 43, session.token):
        with pytest.raises(InvalidArgument, match="is no type"):
            room.sessions.get(token, given)
    with pytest.raises(InvalidArgument, match="is no type"):
        room.sessions.rotate(session, given)
    assert room.stats.counts["sessions_missing"] == 0


@pytest.mark.parametrize("given", ["5", float("nan"), True, None, -1])
def test_a_run_of_upkeep_says_what_seconds_are(room: Any, given: Any) -> None:
    """How long a run may take is refused in words where it is no number of seconds; a timedelta is one."""
    for run in (room.upkeep.sweep_sessions, room.upkeep.scan_abuse):
        with pytest.raises(InvalidArgument, match=r"^seconds=.*: a number of seconds"):
            run(seconds=given)
        assert run(seconds=timedelta(seconds=5))["done"]


def test_an_order_says_whose_arguments_have_no_json(room: Any) -> None:
    """Bytes that are no text can't be sent to a worker. The error names the loader, and a call works."""
    inner = getattr(room, "inner", room)

    @inner.cache.cached("by-digest:{digest}")
    def by_digest(digest: bytes) -> int:
        return len(digest)

    with pytest.raises(ValueError, match="by_digest: its arguments have no JSON"):
        room.tasks.load(by_digest, b"\xff")
    again = room.cache.cached("size:{digest}", name="size", ttl=60, swr=60)(
        by_digest.__wrapped__  # type: ignore[attr-defined]
    )
    assert [again(b"\xff"), again(b"\xff")] == [1, 1]


@pytest.mark.parametrize("depth", [199, 245, 2_000])
def test_arguments_that_no_worker_could_read_are_refused(
    room: Any, state_client: Any, depth: int
) -> None:
    """What is nested deeper than an order can be read back raises ValueError, and is no dead letter later."""
    options: Any = 1
    for _ in range(depth):
        options = [options]
    inner = getattr(room, "inner", room)

    @inner.cache.cached("report:{id}", ttl=60, swr=60, ignore=["options"])
    def report(id: int, options: Any) -> int:
        return id

    with pytest.raises(InvalidArgument, match="report: its arguments have no JSON"):
        room.tasks.load(report, 7, options)
    assert not state_client.exists(room.keys.orders)
    room.tasks.load(report, 7, options[0] if depth == 199 else [])
    assert room.upkeep.reclaim()["done"] == 1


class Repository(Protocol):
    def names(self) -> list[str]: ...


class Shelf:
    def names(self) -> list[str]:
        return ["a", "b"]


class Filters(TypedDict):  # typing's own, which pydantic takes from Python 3.12 on
    limit: int


def test_a_parameter_may_have_a_type_that_nobody_can_check(room: Any) -> None:
    """A parameter may be of a protocol, or of any other type without a schema. The other ones are checked."""
    inner = getattr(room, "inner", room)

    @inner.cache.cached("names:{kind}:{filters}", ignore=["shelf"])
    def names(kind: int, filters: Filters | None = None, shelf: Repository | None = None) -> int:
        return len((shelf or Shelf()).names()) * kind

    room.tasks.load(names, 4, {"limit": 1})
    room.upkeep.reclaim()
    assert room.cache.get(names.key(4, {"limit": 1})) == 8
    with pytest.raises(ValueError, match="kind"):
        room.tasks.load(names, "x")


def test_an_order_loads_what_its_call_reads(room: Any) -> None:
    """An int in a list of floats would be loaded under another key than the call reads, so it can't be ordered."""
    inner = getattr(room, "inner", room)

    @inner.cache.cached("mean:{of}")
    def mean(of: list[float]) -> float:
        return sum(of) / len(of)

    refused = r"this call reads 'mean:\[1,2\]'.* 1\.0 in a list"
    with pytest.raises(ValueError, match=refused):
        room.tasks.load(mean, [1, 2])
    options: Any = {"name": "warmed", "warm_every": 60, "warm_with": [([1, 2],)]}
    with pytest.raises(ValueError, match=refused):
        inner.cache.cached("mean:{of}", **options)(mean.__wrapped__)
    room.tasks.load(mean, [1.0, 2.0])
    room.upkeep.reclaim()
    assert room.cache.get(mean.key([1.0, 2.0])) == 1.5
    assert room.cache.get(mean.key([1, 2])) is None


@pytest.mark.parametrize("name", ["self", "function", "args", "kwargs", "key"])
def test_a_parameter_may_have_any_name(room: Any, name: str) -> None:
    """A loader's parameter may be called as one of the library's own, wherever it is given by its name."""
    made: dict[str, Any] = {}
    exec(f"def double({name}: int) -> int:\n    return 2 * {name}", made)
    double = room.cache.cached(f"double:{{{name}}}")(made["double"])
    assert double(**{name: 2}) == 4
    assert double.key(**{name: 2}) == "double:2"
    assert double.invalidate(**{name: 2}) == 1
    room.tasks.load(getattr(double, "_inner", double), **{name: 2})
