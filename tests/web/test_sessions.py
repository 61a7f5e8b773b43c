"""A request has its session, through both middlewares and real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stillroom import InvalidKey, Stillroom
from stillroom.sessions.token import make_token
from stillroom.web.request_session import WebSession
from stillroom.web.session_cookie import SessionCookie
from tests.support.monitor import ON_ITS_WAY, READS_SESSION, sent
from tests.support.sessions import age, break_records, end_grace, sessions_keys
from tests.support.web import WITHIN, Browser, Reply
from tests.web.conftest import Serve

pytestmark = pytest.mark.usefixtures("bounded")


def answered(client: Any, ask: Callable[[], Reply]) -> tuple[Reply, list[str]]:
    """Return the reply and the batches that reached Redis meanwhile, one script each."""
    replies: list[Reply] = []
    batches = sent(client, lambda: replies.append(ask()), but=ON_ITS_WAY)
    return replies[0], batches


def live(room: Stillroom, browser: Browser) -> Any:
    """Return the session of the browser's cookie."""
    assert browser.token
    found = room.sessions.get(browser.token, touch=False)
    assert found is not None
    return found


# What browsers, and others, send


@pytest.mark.parametrize(
    "cookie",
    [
        "__Host-sid=" + "A" * 50_000,
        "x=" + "y" * 50_000,
        "__Host-sid=../../etc/passwd",
        "__Host-sid=%0d%0aSet-Cookie:%20a=b",
        f"__Host-sid={make_token(1, b'a' * 32)}; __Host-sid={make_token(1, b'b' * 32)}",
        f"sid={make_token(1, b'a' * 32)}; sessionid=abc; csrftoken={'x' * 64}",
        ";" * 10_000,
        "\xff\xfe=\x01; __Host-sid=\xe9",
    ],
    ids=["large", "others large", "path", "line break", "two", "others", "empty", "bytes"],
)
def test_strange_cookies_are_as_good_as_none(browser: Browser, client: Any, cookie: str) -> None:
    """A malformed cookie sends no command, raises nothing, and the first data begins a session of its own."""
    reply, commands = answered(client, lambda: browser.get("/cart", headers={"Cookie": cookie}))
    assert (reply.status, reply.text, reply.token, commands) == (200, "[]", None, [])
    reply = browser.get("/cart/add?tea", headers={"Cookie": cookie})
    assert reply.token
    assert reply.token not in cookie


# What is written, and when


def test_a_request_that_does_not_look_costs_nothing(browser: Browser, client: Any) -> None:
    """A request that does not use the session sends no command and no header, with a cookie and without."""
    browser.get("/cart/add?tea")
    for token in (browser.token, None, make_token(3, b"x" * 32), "junk"):
        browser.token = token
        reply, commands = answered(client, lambda: browser.get("/plain"))
        assert (reply.status, reply.text) == (200, '"plain"')
        assert commands == []
        assert reply.all("set-cookie") == reply.all("vary") == []


def test_nothing_is_written_until_there_is_data(browser: Browser, client: Any) -> None:
    """Reading a missing session leaves no key and no cookie, and forgets a cookie that opens nothing."""
    reply, commands = answered(client, lambda: browser.get("/cart"))
    assert (reply.text, reply.token, commands) == ("[]", None, [])
    assert reply.one("vary") == "Cookie"
    browser.token = make_token(3, b"x" * 32)
    reply, commands = answered(client, lambda: browser.get("/cart"))
    assert (reply.text, reply.token) == ("[]", "")
    assert commands[-3:] == [*READS_SESSION, "EXISTS"]  # nobody has just logged in in its place
    assert sessions_keys(client) == []


def test_data_begins_a_session_and_its_cookie(browser: Browser, room: Stillroom) -> None:
    """Data begins a session with the cookie `__Host-sid`, for https and this host, for the absolute life."""
    reply = browser.get("/cart/add?tea")
    assert reply.one("set-cookie") == (
        f"__Host-sid={browser.token}; Max-Age=604800; Path=/; HttpOnly; SameSite=Lax; Secure"
    )
    assert reply.one("cache-control") == "private"
    assert reply.one("vary") == "Cookie"
    session = live(room, browser)
    assert (session.user_id, session.data) == (None, {"cart": ["tea"]})


def test_the_next_request_reads_it_in_one_round_trip_and_sets_no_cookie(
    browser: Browser, client: Any
) -> None:
    """The next request reads the session in one round trip and sets no cookie."""
    browser.get("/cart/add?tea")
    browser.get("/cart")
    reply, commands = answered(client, lambda: browser.get("/cart"))
    assert (reply.text, commands, reply.token) == ('["tea"]', READS_SESSION, None)


def test_being_seen_is_the_servers_business(browser: Browser, client: Any, room: Stillroom) -> None:
    """A look that extends the session sends no cookie, because the browser keeps it up to the absolute end."""
    browser.get("/cart/add?tea")
    age(client, room, live(room, browser).handle, 3_600)
    before = live(room, browser).expires_at
    assert browser.get("/cart").all("set-cookie") == []
    assert live(room, browser).expires_at > before + 3_000


def test_a_change_writes_only_what_changed(browser: Browser, room: Stillroom) -> None:
    """A change writes only the changed keys, leaves other requests' keys, and can remove one."""
    browser.get("/set?a=1&b=2")
    room.sessions.update(browser.token or "", {"elsewhere": True})
    browser.get("/set?a=3")
    browser.get("/drop?b")
    assert live(room, browser).data == {"a": "3", "elsewhere": True}
    assert live(room, browser).version == 4


def test_a_list_changed_in_place_is_written(browser: Browser, room: Stillroom) -> None:
    """A list that was changed in place is written without `modified`."""
    browser.get("/cart/add?tea")
    browser.get("/deep?jam")
    assert live(room, browser).data == {"cart": ["tea", "jam"]}


def test_looking_at_a_list_writes_nothing(browser: Browser, room: Stillroom, client: Any) -> None:
    """Reading a list writes nothing, because it did not change."""
    browser.get("/cart/add?tea")
    browser.get("/cart")  # the script is there now
    _, commands = answered(client, lambda: browser.get("/keys"))
    assert commands == READS_SESSION
    assert live(room, browser).version == 1


def test_keys_with_any_name_are_kept(browser: Browser, room: Stillroom) -> None:
    """Keys of any name are kept, also names that the record itself uses."""
    browser.get("/set?_flashes=hi&two%20words=yes")
    assert json.loads(browser.get("/keys").text) == {"_flashes": "hi", "two words": "yes"}
    assert live(room, browser).data == {"x._flashes": "hi", "x.two-20words": "yes"}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST"])
def test_any_method_may_write(browser: Browser, room: Stillroom, method: str) -> None:
    """Any method may write the session, HEAD included."""
    reply = browser.get("/cart/add?tea", method)
    assert reply.status == 200
    assert reply.text == ("" if method == "HEAD" else '["tea"]')
    assert live(room, browser).data == {"cart": ["tea"]}


# Who is logged in


def test_a_login_gives_a_new_token_and_keeps_the_cart(browser: Browser, room: Stillroom) -> None:
    """A login gives a new token and keeps the cart as the user's; the earlier token opens nothing."""
    browser.get("/cart/add?tea")
    before = browser.token
    assert browser.get("/login?ann").text == '"ann"'
    assert browser.token != before
    session = live(room, browser)
    assert (session.user_id, session.data, session.tags) == ("ann", {"cart": ["tea"]}, ("web",))
    assert room.sessions.get(before or "") is None
    assert [device.handle for device in room.sessions.list_for_user("ann")] == [session.handle]


@pytest.mark.parametrize("field", ["cart", "_v", "_c"])
@pytest.mark.parametrize("path", ["/cart", "/cart/add?jam", "/login?ann", "/logout", "/renew"])
def test_a_session_that_can_not_be_read_is_taken_for_an_ended_one(
    browser: Browser, client: Any, caplog: pytest.LogCaptureFixture, path: str, field: str
) -> None:
    """A visitor whose record is broken goes on without it, as if it had ended, and the log says so."""
    browser.get("/cart/add?tea")
    old = browser.token
    break_records(client, field)
    assert browser.get(path).status == 200
    assert browser.token != old
    assert "a session can't be read" in caplog.text
    assert browser.get("/cart").text == ('["jam"]' if "jam" in path else "[]")


@pytest.mark.parametrize("field", ["_b", "_x", "_i", "_l", "_s"])
def test_a_number_of_a_record_that_is_none_costs_a_session_at_most(
    browser: Browser, client: Any, field: str
) -> None:
    """A visitor whose record has nonsense in the place of a number is answered, and can fill a cart."""
    for nonsense in (b"nan", b"inf", b"9" * 400, b""):
        browser.get("/cart/add?tea")
        for key in client.keys("*:s:*"):
            client.hset(key, field, nonsense)
        assert [browser.get(path).status for path in ("/cart", "/cart/add?jam")] == [200, 200]
        assert "jam" in browser.get("/cart").text


def test_a_page_that_wants_a_fresh_login_is_answered_with_401(browser: Browser) -> None:
    """A request whose `require_fresh` nobody handles is answered with 401, and keeps its cookie."""
    assert browser.get("/sensitive").status == 401
    browser.get("/login?ann")
    token = browser.token
    assert browser.get("/sensitive").status == 200
    assert browser.token == token


@pytest.mark.parametrize("user", [None, 7, b"ann", "", "x" * 1_025, "\ud800"], ids=repr)
def test_a_login_of_what_is_no_user_is_refused_where_it_is_written(
    room: Stillroom, user: Any
) -> None:
    """A login of None, of a number or of an empty text is refused at once; it begins no anonymous session."""
    session = WebSession(room.operations.sessions, room.state, SessionCookie(), None, {})
    with pytest.raises(InvalidKey):
        session.login(user)
    assert not session.has_changed


def test_a_planted_token_opens_nothing_after_the_login(browser: Browser, room: Stillroom) -> None:
    """A planted token, living or invented, opens nothing after the login."""
    for planted in (room.sessions.create(None, {"mine": 1}).token, make_token(1, b"p" * 32)):
        browser.token = planted
        browser.get("/login?ann")
        assert browser.token != planted
        assert room.sessions.get(planted) is None


def test_another_user_does_not_inherit_the_data(browser: Browser, room: Stillroom) -> None:
    """A login of another user begins with empty data; the same user keeps the data."""
    browser.get("/login?ann")
    browser.get("/cart/add?tea")
    browser.get("/login?ann")
    assert browser.get("/cart").text == '["tea"]'
    browser.get("/login?bob")
    assert (browser.get("/who").text, browser.get("/cart").text) == ('"bob"', "[]")
    assert room.sessions.list_for_user("ann") == []


def test_a_logout_ends_the_session_and_the_cookie(
    browser: Browser, room: Stillroom, client: Any
) -> None:
    """A logout ends session and cookie, and leaves only a minute's mark that the browser got another cookie."""
    browser.get("/login?ann")
    token = browser.token
    reply = browser.get("/logout")
    assert reply.token == ""
    assert "Max-Age=0" in str(reply.one("set-cookie"))
    assert room.sessions.get(token or "") is None
    (note,) = sessions_keys(client)
    assert b":late:" in note
    assert 0 < client.ttl(note) <= 60
    assert Browser(browser.port, token).get("/who").text == "null"
    assert Browser(browser.port).get("/logout").token is None


def test_rights_that_change_take_a_new_token(browser: Browser, room: Stillroom) -> None:
    """`renew` keeps the session and its data under a new token, and the old token opens nothing."""
    browser.get("/login?ann")
    before, handle = browser.token, live(room, browser).handle
    reply = browser.get("/renew")
    assert reply.token
    assert reply.token != before
    assert live(room, browser).handle != handle
    assert live(room, browser).user_id == "ann"
    assert room.sessions.get(before or "") is None


def test_an_old_token_does_not_come_back_over_the_new_one(
    browser: Browser, room: Stillroom, client: Any
) -> None:
    """A request with the old token is served within the grace and sets no cookie, because it may answer late."""
    browser.get("/cart/add?tea")
    late = Browser(browser.port, browser.token)
    rotated = room.sessions.rotate(browser.token or "", grace=10)
    age(client, room, rotated.handle, 3_600)
    reply = late.get("/cart")
    assert (reply.text, reply.token) == ('["tea"]', None)
    assert late.get("/cart/add?jam").token is None
    found = room.sessions.get(rotated.token)
    assert found is not None
    assert found.data == {"cart": ["tea", "jam"]}
    end_grace(client, room, room_handle_of(late, room))
    assert late.get("/cart").text == "[]"
    assert late.get("/cart").token is None


def room_handle_of(browser: Browser, room: Stillroom) -> str:
    """Return the handle of a token, also of one that was rotated away."""
    place = room._sessions_body._place(browser.token or "")
    assert place is not None
    return f"{place.shard:02x}-{place.names[0].decode()}"


# Many at once


def test_requests_on_one_session_do_not_undo_one_another(serve: Serve, room: Stillroom) -> None:
    """Four requests that read the session before any of them wrote keep all four keys."""
    meet = threading.Barrier(4)
    with serve(lambda path: meet.wait(WITHIN) if path == "/set" else None) as port:
        token = room.sessions.create(None, {"first": "1"}).token
        with ThreadPoolExecutor(4) as threads:
            paths = [f"/set?k{n}={n}" for n in range(4)]
            replies = list(threads.map(lambda path: Browser(port, token).get(path), paths))
    assert [reply.status for reply in replies] == [200] * 4
    found = room.sessions.get(token)
    assert found is not None
    assert found.data == {"first": "1", **{f"k{n}": str(n) for n in range(4)}}


def test_a_logout_meanwhile_is_told(serve: Serve, room: Stillroom, client: Any) -> None:
    """A change to a session that ended meanwhile is a 409, leaves the cookie and brings nothing back."""
    ending: list[str] = []

    def end(path: str) -> None:
        if path == "/set":
            room.sessions.destroy(ending[0])

    with serve(end) as port:
        browser = Browser(port)
        browser.get("/login?ann")
        ending.append(browser.token or "")
        reply = browser.get("/set?a=1")
    assert (reply.status, reply.one("content-type")) == (409, "application/problem+json")
    assert json.loads(reply.text)["status"] == 409
    assert reply.token is None
    assert sessions_keys(client) == []


# When it goes wrong


def failing(browser: Browser, path: str) -> Reply:
    reply = browser.get(path)
    assert reply.status >= 500
    assert reply.token is None
    return reply


def test_a_failed_request_keeps_nothing(
    browser: Browser, room: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A response of 5xx or an exception writes nothing and logs it; one of 4xx writes."""
    browser.get("/cart/add?tea")
    failing(browser, "/fail/500?jam")
    failing(browser, "/fail/503?jam")
    assert caplog.text.count("changes to the session are dropped") == 2
    failing(browser, "/raise?jam")
    assert live(room, browser).data == {"cart": ["tea"]}
    browser.get("/fail/404?jam")
    assert live(room, browser).data == {"cart": ["jam"]}
