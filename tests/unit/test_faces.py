"""Both faces have the right signatures, and a call that cannot be meant is refused clearly."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import pydoc
import re
import traceback
import typing
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from flask import Flask

from stillroom import (
    API,
    AsyncStillroom,
    BanRefused,
    InlineDispatch,
    InvalidArgument,
    InvalidKey,
    InvalidLimit,
    Limit,
    NoDispatch,
    Route,
    Routes,
    Settings,
    SettingsError,
    Stillroom,
    web,
)
from stillroom.cache import AsyncCache, Cache, CacheBody, Images, ShardedBody
from stillroom.embedded import EmbeddedServer
from stillroom.in_force import said
from stillroom.integrations.sqlalchemy import AfterCommit
from stillroom.testing import Clock
from stillroom.testing.override import overridden
from stillroom.web import WebSession, asgi, fastapi, flask, starlette, wsgi
from stillroom.web.pages import Pages

SERVICES = ("cache", "sessions", "limits", "abuse", "health", "tasks", "upkeep")
# Never awaited, in both faces.
PLAIN = {"cache.cached", "limits.client", "limits.hold", "health.register"}


@pytest.fixture(scope="module")
def sync_room() -> Stillroom:
    return Stillroom(dispatch=NoDispatch())


@pytest.fixture(scope="module")
def async_room() -> AsyncStillroom:
    return AsyncStillroom(dispatch=NoDispatch())


def methods_of(room: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    for service in SERVICES:
        for name, method in inspect.getmembers(getattr(room, service), callable):
            if not name.startswith("_"):
                yield f"{service}.{name}", method


def test_every_awaited_method_is_a_coroutine_function(async_room: AsyncStillroom) -> None:
    """Every awaited method is a coroutine function, by which Starlette and FastAPI decide to await it."""
    found = dict(methods_of(async_room))
    assert len(found) > 50
    for name, method in found.items():
        assert inspect.iscoroutinefunction(method) == (name not in PLAIN), name


def test_no_blocking_method_is_a_coroutine_function(sync_room: Stillroom) -> None:
    """No blocking method is a coroutine function."""
    assert not any(inspect.iscoroutinefunction(method) for _, method in methods_of(sync_room))


@pytest.mark.parametrize("kind", [Stillroom, AsyncStillroom])
def test_a_signature_says_what_a_method_returns(kind: Any) -> None:
    """A signature states the type a caller gets, and its annotations can be evaluated."""
    for name, method in methods_of(kind(dispatch=NoDispatch())):
        signature = str(inspect.signature(method))
        assert "Operation[" not in signature + pydoc.plain(pydoc.render_doc(method)), name
        assert "Unpack" not in signature, name
        assert typing.get_type_hints(method), name
        assert inspect.signature(method).return_annotation is not inspect.Signature.empty, name


@pytest.mark.parametrize("kind", [Stillroom, AsyncStillroom])
def test_the_services_are_known_to_the_class(kind: Any) -> None:
    """The services are attributes of the class, where editors and docs tools look, and help() names them."""
    hints = typing.get_type_hints(kind)
    room = kind(dispatch=NoDispatch())
    for service in SERVICES:
        assert type(getattr(room, service)) is hints[service]
        assert f"`{service}`" in pydoc.getdoc(kind)


def test_a_method_is_the_faces(sync_room: Stillroom) -> None:
    """A method has its face's name in help() and in a traceback."""
    assert sync_room.cache.get.__qualname__ == "Cache.get"  # type: ignore[attr-defined]
    assert "Help on method get in module stillroom.cache.cache" in pydoc.render_doc(
        sync_room.cache.get, "Help on %s", renderer=pydoc.plaintext
    )


CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cache.get": ("defalt", ("k",)),
    "cache.set": ("tll", ("k", 1)),
    "cache.get_or_set": ("tag", ("k", int)),
    "cache.get_many": ("typ", (["k"],)),
    "cache.set_many": ("ttls", ({"k": 1},)),
    "cache.get_or_set_many": ("swrr", (["k"], dict)),
    "cache.add": ("tll", ("k", 1)),
    "cache.touch": ("tll", ("k",)),
    "cache.invalidate": ("deferr", ("k",)),
    "cache.invalidate_by_tag": ("sfot", ("t",)),
    "cache.clear": ("defered", ()),
    "cache.cached": ("tll", ("k",)),
    "sessions.create": ("idel", ("u",)),
    "sessions.get": ("tuch", ("t",)),
    "sessions.destroy_for_user": ("keeep", ("u",)),
    "limits.check": ("costs", ("192.0.2.1", [])),
    "limits.reserve": ("rout", ("192.0.2.1", [])),
    "abuse.report": ("usr", ("auth_fail",)),
    "abuse.ban": ("reson", ("192.0.2.1", 60)),
    "tasks.invalidate_tags": ("sotf", ("t",)),
    "health.history": ("hour", ()),
    "upkeep.reclaim": ("budgt", ()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [Stillroom, AsyncStillroom])
def test_an_option_nobody_knows_is_refused_with_the_right_one(kind: Any, call: str) -> None:
    """An unknown option of any call is refused with the probable one before anything is sent."""
    room = kind("redis://127.0.0.1:1", dispatch=NoDispatch())
    service, _, name = call.partition(".")
    wrong, args = CALLS[call]
    method = getattr(getattr(room, service), name)
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected .* '{wrong}'; did you mean"
    ):
        _finish(method(*args, **{wrong: 1}))


MADE: dict[str, tuple[Callable[..., Any], str]] = {
    "Stillroom": (Stillroom, "dispach"),
    "AsyncStillroom": (AsyncStillroom, "tll"),
    "Stillroom.lock": (Stillroom(dispatch=NoDispatch()).lock, "leese"),
    "AsyncStillroom.lock": (AsyncStillroom(dispatch=NoDispatch()).lock, "waits"),
    "Stillroom.semaphore": (Stillroom(dispatch=NoDispatch()).semaphore, "slot"),
    "AsyncStillroom.semaphore": (AsyncStillroom(dispatch=NoDispatch()).semaphore, "longst"),
    "Limits.hold": (Stillroom(dispatch=NoDispatch()).limits.hold, "rout"),
    "AsyncLimits.hold": (AsyncStillroom(dispatch=NoDispatch()).limits.hold, "costs"),
    "Limit": (Limit, "in_fligth"),
    "Route": (Route, "methdos"),
    "Routes": (Routes, "defalt"),
    "ASGI's StillroomMiddleware": (asgi.StillroomMiddleware, "route"),
    "WSGI's StillroomMiddleware": (wsgi.StillroomMiddleware, "sesions"),
    "HealthASGI": (web.HealthASGI, "rom"),
    "HealthWSGI": (web.HealthWSGI, "rom"),
    "SessionCookie": (web.SessionCookie, "same_sit"),
    "WebSession.login": (partial(WebSession.login, None, "ann"), "idel"),
    "FlaskSession.login": (partial(flask.FlaskSession.login, None, "ann"), "mata"),
    "Starlette's limited": (starlette.limited, "cots"),
    "Starlette's fresh_session": (starlette.fresh_session, "second"),
    "FastAPI's limited": (fastapi.limited, "exempt_wen"),
    "Flask's limited": (flask.limited, "coun"),
    "Flask's fresh": (flask.fresh, "second"),
    "StillroomLimits": (flask.StillroomLimits, "rende"),
    "StillroomSessions": (flask.StillroomSessions, "cokie"),
    "init_app": (partial(Stillroom(dispatch=NoDispatch()).init_app, Flask("app")), "sesions"),
    "Pages": (Pages, "cdnn"),
    "Pages.page": (Pages(Stillroom(dispatch=NoDispatch())).page, "swrr"),
    "AfterCommit.invalidate_by_tag": (
        partial(AfterCommit(Stillroom(dispatch=NoDispatch())).invalidate_by_tag, None),
        "sotf",
    ),
    "EmbeddedServer": (EmbeddedServer, "prot"),
    "overridden": (overridden, "dispach"),
}


@pytest.mark.parametrize("what", MADE)
def test_what_is_made_or_decorated_suggests_the_right_option_too(what: str) -> None:
    """Classes, decorators, locks and test helpers refuse an unknown option with the probable one where
    it is written.
    """
    call, wrong = MADE[what]
    with pytest.raises(TypeError, match=rf"'?{wrong}\b.*did you mean"):
        call(**{wrong: 1})


WRONG: dict[str, tuple[Callable[[Stillroom], Any], str]] = {
    "a name of what is given without one": (
        lambda room: room.cache.invalidate_by_tag(tag="shop"),  # type: ignore[call-arg]
        r"'tag'; it takes \*tags, soft, defer$",
    ),
    "another library's name": (
        lambda room: room.cache.cached("rates", expire=60),  # type: ignore[call-arg]
        "'expire'; did you mean ttl\\?$",
    ),
    "what is like nothing that there is": (
        lambda room: room.cache.cached("rates", wait=60),  # type: ignore[call-arg]
        "'wait'; it takes key, ttl, swr",
    ),
    "a kind of limit": (
        lambda _: Limit("mine", 5, 60, kind="strict"),  # type: ignore[call-arg]
        "'kind'; it takes name, quota, window",
    ),
    "a window as a timedelta": (
        lambda _: Limit("mine", 5, timedelta(minutes=5)),  # type: ignore[arg-type]
        r"window is a whole number, .* seconds; did you mean 300\?",
    ),
    "a window as a text": (
        lambda _: Limit("mine", 5, "5 minutes"),  # type: ignore[arg-type]
        r"did you mean 300\?",
    ),
    "a text for soft": (
        lambda room: room.cache.invalidate_by_tag("shop", soft="no"),  # type: ignore[arg-type]
        "^soft='no': True or False$",
    ),
    "a text for defer": (
        lambda room: room.cache.clear(defer="no"),  # type: ignore[arg-type]
        "^defer='no': True or False$",
    ),
    "a text for memo": (
        lambda room: room.cache.cached("rates", memo="no")(test_option),  # type: ignore[call-overload]
        "^memo='no': True or False$",
    ),
    "a text for sessions": (
        lambda room: Pages(room).page(ttl=60, sessions="no"),  # type: ignore[arg-type]
        "^sessions='no': True or False$",
    ),
    "a page that varies by a cookie": (
        lambda room: Pages(room).page(ttl=60, vary=["Cookie"]),
        "vary='Cookie': the name of a header other than Cookie",
    ),
    "pages of no room": (lambda _: Pages(API), r"a Stillroom or AsyncStillroom, not"),  # type: ignore[type-var]
    "pages of no app": (lambda room: Pages(room).install(API), "not Limit"),
    "an app of another framework": (lambda room: room.init_app(API), "a Flask app, not Limit"),
    "a user without a name": (
        lambda room: room.sessions.create(""),
        "^'': a user has 1 to 1,024 bytes",
    ),
    "a lock without a name": (lambda room: room.lock(""), "^'': a lock's name has 1 to 1,024"),
    "a limit as another library writes it": (
        lambda _: Limit("mine", "5/minute"),  # type: ignore[call-arg]
        "'window'; it takes name, quota, window, by,",
    ),
    "a place for what has a name": (
        lambda room: room.cache.set("rates", 1, 60),  # type: ignore[call-arg]
        "too many positional arguments; by name only: ttl, swr, tags, type$",
    ),
    "one argument too many": (
        lambda room: room.cache.clear("rates"),  # type: ignore[call-arg]
        "too many positional arguments; by name only: defer$",
    ),
    "one more where nothing is by name only": (
        lambda room: room.limits.names("api"),  # type: ignore[call-arg]
        "too many positional arguments; it takes none$",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_hint_can_be_followed(sync_room: Stillroom, what: str) -> None:
    """What is said of a wrong call leads to a right one: it names only what can be given so."""
    call, said = WRONG[what]
    with pytest.raises((InvalidArgument, InvalidKey, InvalidLimit), match=said):
        call(sync_room)


USERS: dict[str, Callable[[Any], Any]] = {
    "create": lambda sessions: sessions.create(7),
    "list_for_user": lambda sessions: sessions.list_for_user(7),
    "destroy_for_user": lambda sessions: sessions.destroy_for_user(7),
    "end": lambda sessions: sessions.end(7, "a"),
    "count": lambda sessions: sessions.count(7),
}


@pytest.mark.parametrize("method", USERS)
def test_a_user_who_is_no_text_is_said_to_be_so(sync_room: Stillroom, method: str) -> None:
    """A primary key in a user's place is refused as a user, and not as a key or a tag."""
    with pytest.raises(InvalidKey, match=r"7: a user is a str, not int; did you mean str\(user"):
        USERS[method](sync_room.sessions)


def test_an_observer_can_observe(sync_room: Stillroom) -> None:
    """What can't be told of operations is refused, and does not fail each of them."""
    with pytest.raises(InvalidArgument, match="a function is for on_event"):
        sync_room.observe(print)  # type: ignore[arg-type]
    assert sync_room.cache.get("k") is None


def test_a_test_overrides_a_room() -> None:
    """A module or an app in the room's place is refused as such by the test's helper."""
    with pytest.raises(InvalidArgument, match="the app's Stillroom or AsyncStillroom"):
        with overridden(web, Settings()):  # type: ignore[type-var]
            pass


def test_loaders_are_listed_by_name(sync_room: Stillroom) -> None:
    """A loop over the loaders gives their names."""
    for name in ("rates", "menu"):
        sync_room.cache.cached(name, name=name)(lambda: 1)
    assert list(sync_room.cache.loaders) == ["menu", "rates"]


def _finish(result: Any) -> Any:
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def test_a_type_error_from_within_is_not_taken_for_a_wrong_call(sync_room: Stillroom) -> None:
    """A TypeError from within a correct call is not taken for a wrong call."""

    def fails() -> int:
        raise TypeError("load() got an unexpected keyword argument 'x'")

    with pytest.raises(TypeError, match=r"^load") as caught:
        sync_room.cache.get_or_set("k", fails, ttl=1)
    assert not isinstance(caught.value, InvalidArgument)


TIMES: dict[str, Callable[[Stillroom, Any], Any]] = {
    "sessions' idle": lambda room, t: room.sessions.create("ann", idle=t),
    "sessions' absolute": lambda room, t: room.sessions.create("ann", absolute=t),
    "a limit's wait": lambda room, t: room.limits.wait("203.0.113.9", [API], timeout=t),
    "a change of a limit": lambda room, t: room.limits.change("api", 1, 1, t),
    "a ban": lambda room, t: room.abuse.ban("203.0.113.9", t),
    "a reclaim's budget": lambda room, t: room.upkeep.reclaim(budget=t),
    "a trim's budget": lambda room, t: room.upkeep.trim_indexes(budget=t),
    "a lock's lease": lambda room, t: room.lock("k", lease=t),
    "Flask's fresh": lambda _, t: flask.fresh(t),
    "Starlette's fresh_session": lambda _, t: starlette.fresh_session(t),
    "a page": lambda room, t: Pages(room).page(ttl=t),
    "a clock": lambda room, t: Clock(room).advance(t),
}


@pytest.mark.parametrize("given", ["60", True, float("nan"), float("-inf"), [60], None], ids=repr)
@pytest.mark.parametrize("what", TIMES)
def test_other_times_are_so_too(sync_room: Stillroom, what: str, given: Any) -> None:
    """Other times refuse text in every place, and None is the default where there is one."""
    if given is None and what in ("sessions' idle", "sessions' absolute", "a page"):
        pytest.skip("None is the setting's")
    with pytest.raises((InvalidArgument, SettingsError), match=r"=.*a number of seconds"):
        TIMES[what](sync_room, given)


WRONG_TIMES = [
    "60",
    True,
    float("nan"),
    float("inf"),
    10**400,
    -1,
    timedelta(seconds=-1),
    [60],
    b"60",
]


@pytest.mark.parametrize("given", WRONG_TIMES, ids=repr)
def test_a_time_is_a_number_of_seconds_or_a_timedelta(sync_room: Stillroom, given: Any) -> None:
    """A time is a number of seconds or a timedelta; text, a bool and other values are refused by argument name."""
    cache = sync_room.cache
    for name, call in {
        "ttl": lambda: cache.set("k", 1, ttl=given),
        "swr": lambda: cache.get_or_set("k", int, swr=given),
        "lease": lambda: cache.cached("k", lease=given, name="x")(test_option),
    }.items():
        with pytest.raises((InvalidArgument, SettingsError), match=f"{name}="):
            call()


def test_a_text_that_is_a_time_is_answered_with_its_seconds(sync_room: Stillroom) -> None:
    """A time as a person writes it is refused with the number of seconds that it means."""
    for given, meant in {
        "5 minutes": 300,
        "1.5h": 5_400,
        "90s": 90,
        "2 days": 172_800,
        "300": 300,
    }.items():
        with pytest.raises(InvalidArgument, match=rf"or a timedelta; did you mean {meant}\?$"):
            sync_room.cache.set("k", 1, ttl=given)  # type: ignore[arg-type]
    for given in ("5ms", "5 months", "-5m", "m", ""):
        with pytest.raises(InvalidArgument, match=r"or a timedelta$"):
            sync_room.cache.set("k", 1, ttl=given)  # type: ignore[arg-type]


def test_large_times_are_written_out(sync_room: Stillroom) -> None:
    """A time that is too long is told in digits that a person reads, and not as 1e+06."""
    with pytest.raises(
        InvalidArgument, match=r"ttl . swr is 1,000,000 s; life_limit allows 604,800 s"
    ):
        sync_room.cache.set("k", 1, ttl=1_000_000)
    with pytest.raises(InvalidArgument, match="lease=1,000,000 s; lease_limit allows 300 s"):
        sync_room.cache.cached("k", lease=1_000_000, name="x")(test_option)
    with pytest.raises(BanRefused, match="10,000,000 seconds; a ban is for"):
        sync_room.abuse.ban("203.0.113.9", 10_000_000)
    assert said("life_limit", 2_592_000.0) == "2592000"


def test_a_time_has_the_name_under_which_it_was_given(sync_room: Stillroom) -> None:
    """A wrong `fresh` is refused by that name, whether the session is there or not."""
    with pytest.raises(InvalidArgument, match=r"^fresh='10m'"):
        sync_room.sessions.get("no token", fresh="10m")  # type: ignore[call-overload]


def test_option() -> None:
    """This function without parameters is cached by the tests; a test may be one, too."""


async def connected() -> None:
    """Stand for an async context that lacks its `yield`."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a number as settings": (lambda: Stillroom(7), "<int>: a room is given Settings"),  # type: ignore[arg-type]
    "a URL twice": (lambda: Stillroom("redis://a", redis_url="redis://b"), "given twice"),
    "settings and more": (lambda: Stillroom(Settings(), ttl=3), "ttl are both given"),
    "a class as dispatch": (
        lambda: Stillroom(dispatch=InlineDispatch),  # type: ignore[arg-type]
        r"write InlineDispatch\(\)",
    ),
    "a name as dispatch": (
        lambda: Stillroom(dispatch="inline"),  # type: ignore[arg-type]
        r"dispatch='inline': .*InlineDispatch\(\)",
    ),
    "the name of a variable": (lambda: Stillroom(STILLROOM_TTL=5), "did you mean ttl"),
    "no URL": (lambda: Stillroom("localhost:6379"), "a Redis URL starts with one of redis://"),
    "another library's host": (lambda: Stillroom(host="h"), "did you mean redis_url"),
    "another library's prefix": (lambda: AsyncStillroom(prefix="p"), "did you mean namespace"),
    "a misspelt setting": (lambda: AsyncStillroom(tll=3), "did you mean ttl"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_room_can_not_be_made_of_is_refused(what: str) -> None:
    """An argument that no room can be made of is refused where the room is made."""
    make, sentence = REFUSED[what]
    with pytest.raises((InvalidArgument, SettingsError), match=sentence):
        make()


@pytest.mark.parametrize(
    ("give", "sentence"),
    [
        (
            lambda room: room.on_event(None),
            "on_event=None: a function that is called with one Event",
        ),
        (lambda room: room.on_event(lambda: None), "is called with one Event"),
        (lambda room: room.around_load(lambda loader: loader), "given nothing; missing"),
        (lambda room: room.around_load(connected), "this one has to be awaited"),
        (lambda room: room.health.register("sate", app), "cache or state; did you mean state"),
        (lambda room: room.health.register("state", app, 1), "shard=1: from 0 to 0"),
        (lambda room: room.health.register("cache", app, -1), "shard=-1: from 0 to 0"),
    ],
)
def test_what_could_never_be_called_is_refused(
    give: Callable[[Any], Any], sentence: str, sync_room: Stillroom, async_room: AsyncStillroom
) -> None:
    """What would fail at each event, load or report is refused where it is given."""
    for room in (sync_room, async_room):
        with pytest.raises(InvalidArgument, match=sentence):
            give(room)


@pytest.mark.parametrize("kind", [Stillroom, AsyncStillroom])
def test_a_room_is_given_a_url_settings_or_values(kind: Any) -> None:
    """A room is made of a URL, of settings or of values."""
    assert kind("redis://one:1").settings.redis_url == "redis://one:1"
    assert kind("redis://one:1", ttl=timedelta(minutes=1)).settings.ttl == 60
    assert kind(redis_url="redis://two:2", namespace="n").settings.namespace == "n"
    settings = Settings(ttl=5)
    assert kind(settings).settings is settings
    assert kind().settings == Settings()


def app() -> Any:
    """Run a line of the app."""
    return 1 / 0


def frames_of(error: BaseException) -> list[str]:
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


def test_a_traceback_shows_the_apps_frames_and_at_most_one_of_ours(sync_room: Stillroom) -> None:
    """A traceback shows the app's frames and at most one of ours, for our errors and for a loader's."""
    room = AsyncStillroom("redis://127.0.0.1:1", dispatch=NoDispatch())
    sync = Stillroom("redis://127.0.0.1:1", dispatch=NoDispatch())

    async def load() -> Any:
        return app()

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: sync.cache.get(7),  # type: ignore[call-overload]
        "away": lambda: sync.cache.invalidate("k"),
        "option": lambda: sync.cache.set("k", 1, ttl="5"),  # type: ignore[arg-type]
        "keyword": lambda: sync.cache.set("k", 1, tll=5),  # type: ignore[call-arg]
        "loader": lambda: sync.cache.get_or_set("k", app),
        "cached": sync.cache.cached("cached")(app),
        "async loader in a thread": lambda: sync.cache.get_or_set("k", load),
        "awaited": lambda: asyncio.run(room.cache.get_or_set("k", load)),
        "in a thread": lambda: asyncio.run(room.cache.get_or_set("k", app)),
        "nested": lambda: sync.cache.get_or_set("k", lambda: sync.cache.get(7)),  # type: ignore[call-overload]
    }
    for name, call in calls.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        frames = frames_of(caught.value)
        assert sum("shared/stillroom" in frame for frame in frames) <= 1, name
        own = [frame for frame in frames if frame == __file__]
        assert len(own) >= (3 if "loader" in name or name in ("nested", "awaited") else 2), name
        if isinstance(caught.value, ZeroDivisionError):
            assert frames[-1] == __file__, name


@dataclasses.dataclass(frozen=True)
class NotFound(Exception):
    """An error of an app to which nothing can be assigned, not even a traceback."""

    id: int


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_frozen_error_reaches_its_caller(is_watched: bool) -> None:
    """An error that is a frozen dataclass reaches whoever called the loader, as any other error does."""
    room = AsyncStillroom("redis://127.0.0.1:1", dispatch=NoDispatch())
    sync = Stillroom("redis://127.0.0.1:1", dispatch=NoDispatch())
    if is_watched:
        room.on_event(lambda event: None)
        sync.on_event(lambda event: None)

    def load(id: int) -> int:
        raise NotFound(id)

    async def load_async(id: int) -> int:
        raise NotFound(id)

    cached, awaited = sync.cache.cached("n:{id}")(load), room.cache.cached("n:{id}")(load_async)
    calls: dict[str, Callable[[], Any]] = {
        "cached": lambda: cached(7),
        "many": lambda: cached.many([7]),
        "get_or_set": lambda: sync.cache.get_or_set("k", lambda: load(7)),
        "get_or_set_many": lambda: sync.cache.get_or_set_many(["k"], lambda keys: {"k": load(7)}),
        "awaited": lambda: asyncio.run(awaited(7)),
        "many awaited": lambda: asyncio.run(awaited.many([7, 7])),
    }
    for name, call in calls.items():
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value == NotFound(7), name
        assert frames_of(caught.value)[-1] == __file__, name


def test_a_bug_of_ours_keeps_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback of a bug in Stillroom keeps its frames, so that a reporter sees where it was."""
    room = Stillroom(dispatch=NoDispatch())
    monkeypatch.setattr(room.cache._body, "keys", None)
    with pytest.raises(AttributeError) as caught:
        room.cache.get("k")
    assert any(frame.endswith("cache/core.py") for frame in frames_of(caught.value))


def test_limits_and_routes_say_what_was_meant() -> None:
    """Limits and routes made at start name the option that was probably meant."""
    with pytest.raises(TypeError, match="did you mean away"):
        Limit("mine", 5, 60, awy="open")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean methods"):
        Route("/a", [API], methds=["GET"])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean default"):
        Routes([], defalt=[API])  # type: ignore[call-arg]


def test_a_key_is_a_str(sync_room: Stillroom) -> None:
    """A key is a str and several keys are a list: one text is one key, not one for each letter."""
    with pytest.raises(InvalidKey, match="a key or a tag is a str, not int"):
        sync_room.cache.get(7)  # type: ignore[call-overload]
    for call in (sync_room.cache.get_many, sync_room.cache.invalidate_many):
        with pytest.raises(
            InvalidArgument, match=r"give a list of keys; for one key write \[key\]"
        ):
            call("product:7")
    with pytest.raises(InvalidArgument, match="give a list of keys"):
        sync_room.cache.get_or_set_many("product:7", lambda keys: {})
    with pytest.raises(InvalidArgument, match="a mapping of keys to values"):
        sync_room.cache.set_many(["product:7"])  # type: ignore[arg-type]
    for tags in (None, b"x", 5):
        with pytest.raises(InvalidArgument, match=f"tags={tags!r}: a text, or a list of them"):
            sync_room.cache.set("k", 1, tags=tags)  # type: ignore[arg-type]
    for of_several in (sync_room.cache.invalidate, sync_room.cache.invalidate_by_tag):
        with pytest.raises(InvalidKey, match=r"write invalidate(_by_tag)?\(\*names\)"):
            of_several(["a", "b"])  # type: ignore[operator]


@pytest.mark.parametrize("option", ["keep", "ttl", "tags"])
@pytest.mark.parametrize("is_partial", [False, True])
def test_a_function_of_the_value_is_not_awaited(
    sync_room: Stillroom, option: str, is_partial: bool
) -> None:
    """A coroutine function is refused where a plain one is called: what it returns would count as a yes."""

    async def decide(value: Any) -> bool:
        return False

    given: Any = functools.partial(decide) if is_partial else decide
    options: dict[str, Any] = {option: [given] if option == "tags" else given}
    said = f"{option}=decide: a plain function; this one has to be awaited"
    for call in (
        lambda: sync_room.cache.get_or_set("k", lambda: 1, **options),
        lambda: sync_room.cache.get_or_set_many(["k"], lambda keys: {}, **options),
        lambda: sync_room.cache.cached("k", name="k", **options)(lambda: 1),
    ):
        with pytest.raises(InvalidArgument, match=said):
            call()


@pytest.mark.parametrize("given", [7, {"a": 1}, None, "load"])
def test_a_load_is_a_function_and_a_step_is_a_number(sync_room: Stillroom, given: Any) -> None:
    """What is no function is refused before it is known whether it has to be called; so is a step of text."""
    cache = sync_room.cache
    with pytest.raises(InvalidArgument, match=r"load=.*: a function; what it returns is kept"):
        cache.get_or_set("k", given)
    with pytest.raises(InvalidArgument, match=r"load_many=.*: a function of a list of keys"):
        cache.get_or_set_many(["k"], given)
    if given != 7:
        with pytest.raises(InvalidArgument, match=r"by=.*: a number"):
            cache.incr("k", given)


OTHER: dict[str, Callable[[Stillroom], Any]] = {
    "reservation=None: what reserve()": lambda room: room.limits.refund(as_any(None)),
    "reservation='r': what reserve()": lambda room: room.limits.settle(as_any("r"), 1),
    "reservation={}: what reserve()": lambda room: room.limits.commit(as_any({})),
    "by=None: a text": lambda room: room.upkeep.pause("refresh", 60, by=as_any(None)),
    "by=7: a text": lambda room: room.limits.change("api", 1, 1, 60, by=as_any(7)),
    "room=None: a Stillroom": lambda _: AfterCommit(as_any(None)),
    "tags=None: a text": lambda room: Pages(room).page(name="none", tags=as_any(None))(as_any),
    "5: not a template": lambda room: Pages(room).page(name="five", tags=[as_any(5)])(as_any),
}


def as_any(given: Any) -> Any:
    """Return what a type checker would have refused."""
    return given


@pytest.mark.parametrize("sentence", OTHER)
def test_an_argument_of_another_type_is_told_in_words(sync_room: Stillroom, sentence: str) -> None:
    """An argument of another type is refused by what was given and what is allowed, before Redis is asked."""
    with pytest.raises((InvalidArgument, InvalidKey), match=f"^{re.escape(sentence)}"):
        OTHER[sentence](sync_room)


# What the shards of a cache say among themselves; each of the others has to say which shards run it.
OF_ONE_SHARD = {
    "pack_many",
    "store_many",
    "order_of",
    "lease_refreshes",
    "undelivered",
    "forget",
    "forget_asked",
    "deferrals",
    "prove",
    "wanted",
}


def test_every_operation_of_the_cache_has_a_rule_for_its_shards() -> None:
    """Every operation of the cache has a rule for its shards, and every public one is in both faces."""
    operations = {name for name in dir(CacheBody) if not name.startswith("_")} - OF_ONE_SHARD
    assert operations - {"shards"} <= set(dir(ShardedBody))
    of_apps = {name for face in (Cache, AsyncCache) for name in dir(face) if name[0] != "_"}
    assert of_apps - {"cached", "gather"} <= operations | {
        n for n in dir(Images) if n[0] != "_"
    } | {"loaders"}
    for face in (Cache, AsyncCache):
        assert {name for name in dir(face) if name[0] != "_"} == of_apps


def test_a_repr_says_what_it_is() -> None:
    """The repr of a room says where it is, without the password, and that of a lock on which terms it is held."""
    for face in (Stillroom, AsyncStillroom):
        room = face("redis://ann:secret@cache:6379/2", namespace="shop", dispatch=NoDispatch())
        assert repr(room) == f"<{face.__name__} redis://ann:***@cache:6379/2 namespace 'shop'>"
        lock = repr(room.semaphore("reports", 2, lease=timedelta(minutes=1)))
        assert re.fullmatch(r"<(Async)?Lock 'reports' slots 2 lease 60 s>", lock)
