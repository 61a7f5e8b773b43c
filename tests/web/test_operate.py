"""The page at /operate acts for operators only, does what each act says, and logs it."""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Iterator
from html import unescape
from typing import Any, NamedTuple
from urllib.parse import urlencode
from wsgiref.validate import validator

import pytest
from pydantic import SecretStr

from stillroom import AUTH, AsyncStillroom, NoDispatch, Settings, Stillroom, acts
from stillroom.acts import ACTS
from stillroom.settings import LOOPBACK
from stillroom.web import HealthASGI, HealthWSGI
from stillroom.web.operate import GROUPS, code
from tests.support.crowd import PATIENT
from tests.support.web import ask, serving_asgi, serving_wsgi

TOKEN = "a-canary-token-for-operators"
BASIC = {"Authorization": "Basic " + base64.b64encode(f"ann:{TOKEN}".encode()).decode()}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
pytestmark = pytest.mark.usefixtures("calm_machine")


class Site(NamedTuple):
    """A server with the page, and a room to check the results."""

    port: int
    room: Stillroom

    def get(self, **headers: str) -> Any:
        return ask(self.port, "/operate", headers=BASIC | headers)

    def act(self, name: str, headers: dict[str, str] | None = None, **form: str) -> str:
        given = {"code": code(TOKEN.encode(), time.time()), "act": name, **form}
        answer = self.post(given, headers or {})
        assert answer.status == 200, answer.body
        return text(answer.body)

    def post(self, form: dict[str, str], headers: dict[str, str]) -> Any:
        body = urlencode(form).encode()
        return ask(self.port, "/operate", "POST", headers=BASIC | FORM | headers, body=body)


def text(page: Any) -> str:
    """Return the text that a reader sees on the page."""
    html = page.decode() if isinstance(page, bytes) else page
    outcome = html.partition('class="outcome')[2].partition("</section>")[0]
    return unescape(re.sub(r"<[^>]+>", " ", outcome))


@pytest.fixture(params=["wsgi", "asgi"])
def site(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Site]:
    own = {"redis_url": settings.redis_url, "health_token": TOKEN, "health_networks": LOOPBACK}
    given = Settings(**own | PATIENT)
    with Stillroom(given, dispatch=NoDispatch()) as room:
        if request.param == "wsgi":
            with serving_wsgi(validator(HealthWSGI(room))) as port:
                yield Site(port, room)
        else:
            async_room = AsyncStillroom(given, dispatch=NoDispatch())
            with serving_asgi(HealthASGI, async_room) as port:
                yield Site(port, room)


def test_only_who_has_the_token_sees_it(site: Site) -> None:
    """Only the token opens the page, from every network; an operator's network opens /status only."""
    assert ask(site.port, "/status").status == 200
    refused = ask(site.port, "/operate")
    assert refused.status == 401
    assert refused.one("www-authenticate").startswith("Basic")
    assert ask(site.port, "/operate", "POST", body=b"act=look").status == 401
    page = site.get()
    assert page.status == 200
    assert "form-action 'self'" in page.one("content-security-policy")
    assert "script" not in page.one("content-security-policy")
    assert TOKEN.encode() not in page.body


def test_without_a_token_there_is_no_such_page(settings: Settings) -> None:
    """Without a token the page does not exist, for this machine either."""
    with (
        Stillroom(settings, dispatch=NoDispatch()) as room,
        serving_wsgi(validator(HealthWSGI(room))) as port,
    ):
        assert ask(port, "/operate").status == 404


@pytest.mark.parametrize(
    ("change", "headers"),
    [
        ({"code": ""}, {}),
        ({"code": "0" * 64}, {}),
        ({"code": code(TOKEN.encode(), time.time() - 3 * 3_600)}, {}),
        ({"code": code(b"another token", time.time())}, {}),
        ({"code": "\xff"}, {}),
        ({}, {"Sec-Fetch-Site": "cross-site"}),
        ({}, {"Sec-Fetch-Site": "same-site"}),
        ({}, {"Origin": "https://evil.example"}),
        ({}, {"Origin": "null"}),
        ({}, {"Origin": "https://[bad"}),
    ],
)
def test_a_form_of_another_page_does_nothing(
    site: Site, change: dict[str, str], headers: dict[str, str]
) -> None:
    """A form from another page does nothing, though the browser sends the password with it."""
    site.room.cache.set("k", 1)
    form = {"code": code(TOKEN.encode(), time.time()), "act": "invalidate", "key": "k"} | change
    answer = site.post(form, headers)
    assert answer.status == 403
    assert b"Nothing was done" in answer.body
    assert site.room.cache.get("k") == 1
    good = {"Origin": f"http://127.0.0.1:{site.port}", "Host": f"127.0.0.1:{site.port}"}
    assert site.post(form | {"code": code(TOKEN.encode(), time.time())}, good).status == 200
    assert site.room.cache.get("k") is None


@pytest.mark.parametrize("ahead", [-3_500, 3_500])
def test_a_form_of_a_machine_whose_clock_differs_is_taken(site: Site, ahead: int) -> None:
    """A form made by a process on another machine is taken here, though its clock is nearly an hour off."""
    form = {"code": code(TOKEN.encode(), time.time() + ahead), "act": "look", "key": "k"}
    assert site.post(form, {}).status == 200


def test_a_key_is_looked_at_and_invalidated(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A key is shown without its value and invalidated by itself, tag or pattern, each with a log line
    naming the actor.
    """
    caplog.set_level(logging.INFO, "stillroom.operator")
    cache = site.room.cache
    cache.set("k", "a-secret-value", ttl=60, tags=["t"])
    shown = site.act("look", key="k")
    assert "k: It is fresh." in shown
    assert "a-secret-value" not in shown
    assert "it held a value" in site.act("invalidate", key="k")
    assert cache.get("k") is None
    for act, form in (("invalidate_tag", {"tag": "t"}), ("invalidate_pattern", {"pattern": "k*"})):
        cache.set("k", 1, ttl=60, tags=["t"])
        site.act(act, **form)
        assert cache.get("k") is None
    cache.set("k", 1, ttl=60, tags=["t"])
    site.act("invalidate_tag", tag="t", soft="yes")
    assert cache.get("k") == 1
    records = [record for record in caplog.records if record.name == "stillroom.operator"]
    lines = [record.getMessage() for record in records]
    assert len(lines) == 5
    assert all("by ann at 127.0.0.1" in line for line in lines)
    assert "invalidate by ann at 127.0.0.1: key=k: k is invalidated; it held a value." in lines
    assert [record.levelname for record in records] == ["INFO", *["WARNING"] * 4]


@pytest.mark.parametrize("until", ["1e18", "Infinity"])
def test_a_time_that_no_calendar_has_is_shown_as_its_number(
    site: Site, client: Any, until: str
) -> None:
    """A time that another program wrote, and no calendar has, leaves the page as it is."""
    change = f'{{"quota": 5, "window": 60, "until": {until}}}'
    client.hset(site.room.keys.limit_changes, "api", change)
    assert f"{float(until):g}" in site.act("limits")


def test_a_list_that_is_cut_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that may have more rows than the page shows does not call its length the number of all."""
    monkeypatch.setattr(acts, "ROWS_MOST", 2)
    room = site.room
    for number in range(3):
        room.sessions.create("u1")
        room.abuse.ban(f"203.0.113.{number}", 60)
        room.state.run(room.dead_letters.add("test", "{}", "because"))
    assert "2 sessions of u1; there may be more." in site.act("sessions", user="u1")
    assert "2 bans; there may be more." in site.act("bans")
    assert "2 dead letters; there may be more." in site.act("letters")


def test_sessions_are_listed_and_ended(site: Site) -> None:
    """Sessions are listed without their data and ended one by one or for a user."""
    sessions = site.room.sessions
    made = [sessions.create("u1", {"data": "a-secret-value"}) for _ in range(3)]
    shown = site.act("sessions", user="u1")
    assert "3 sessions of u1." in shown
    assert all(one.handle in shown and one.token not in shown for one in made)
    assert "a-secret-value" not in shown
    assert "is ended" in site.act("end_session", user="u1", handle=made[0].handle)
    assert "2 sessions of u1 are ended." in site.act("end_sessions", user="u1")
    assert sessions.list_for_user("u1") == []


def test_bans_and_limits_are_changed(site: Site) -> None:
    """Bans are made, listed and lifted, and a client's used quota is forgotten."""
    assert "203.0.113.7 is banned for 10m." in site.act(
        "ban", subject="203.0.113.7", reason="<b>why</b>", **{"for": "10m"}
    )
    shown = site.act("bans")
    assert "203.0.113.7" in shown
    assert "<b>why</b>" in shown, "text, not markup"
    site.act("ban", subject="203.0.113.0/24", **{"for": "1h"})
    said = site.act("lift", subject="203.0.113.7")
    assert "is lifted; for ten minutes no rule bans it again; 203.0.113.0/24 is banned." in said
    assert "203.0.113.7 was not banned; 203.0.113.0/24 is" in site.act(
        "lift", subject="203.0.113.7"
    )
    site.act("lift", subject="203.0.113.0/24")
    limits = site.room.limits
    for _ in range(5):
        limits.check("203.0.113.9", [AUTH])
    assert not limits.peek("203.0.113.9", [AUTH])
    assert "auth" in site.act("limits")
    shown = site.act("peek", subject="203.0.113.9", limit="auth")
    assert "203.0.113.9 has used 5 of auth in 5m." in shown
    assert "203.0.113.8 has used 0 of auth" in site.act("peek", subject="203.0.113.8", limit="auth")
    assert "did you mean auth?" in site.act("peek", subject="203.0.113.9", limit="auht")
    site.act("ban", subject="203.0.113.77", **{"for": "1m"})
    assert "is banned" in site.act("peek", subject="203.0.113.77", limit="auth")
    assert "did you mean auth?" in site.act("reset", subject="203.0.113.9", limit="auht")
    site.act("reset", subject="203.0.113.9", limit="auth")
    assert limits.peek("203.0.113.9", [AUTH])


def test_dead_letters_are_listed_and_dropped(site: Site) -> None:
    """Dead letters are listed with their reason and dropped; one that cannot be sent again here says so."""
    room = site.room
    letter = room.state.run(room.dead_letters.add("test", "{}", "because"))
    shown = site.act("letters")
    assert letter in shown
    assert "because" in shown
    assert "This" not in site.act("drop", id=letter)
    assert "There is no such letter." in site.act("drop", id=letter)
    assert "failed" in site.act("retry", id=letter)


def test_a_key_is_loaded_now(site: Site, client: Any) -> None:
    """A worker is asked to load a key by its entry's loader; an entry without a loader is reported."""
    room = site.room

    @room.cache.cached("product:{number}")
    def product(number: int) -> int:
        return number

    product(7)
    assert "A worker was asked to load product:7 by product." in site.act("load", key="product:7")
    (order,) = client.zrange(room.keys.orders, 0, -1)
    assert b'"product"' in order
    assert b'"number":7' in order.replace(b" ", b"")
    assert "no loader is known for other" in site.act("load", key="other")


def test_refreshes_are_paused(site: Site) -> None:
    """Refreshes are paused and resumed."""
    site.act("pause", **{"for": "10m"})
    assert [one.what for one in site.room.upkeep.pauses()] == ["refresh"]
    assert "go on" in site.act("resume")


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("look", {}, "Key is missing"),
        ("lok", {"key": "k"}, "did you mean look?"),
        ("look", {"key": "x" * 2_000}, "1 to 1,024 bytes"),
        ("ban", {"subject": "127.0.0.1", "for": "10m"}, "127.0.0.1"),
        ("ban", {"subject": "203.0.113.7", "for": "soon"}, "90s, 30m"),
        ("retry", {"id": "nonsense"}, "nonsense"),
    ],
)
def test_what_cannot_be_done_is_said(
    site: Site, name: str, form: dict[str, str], said: str
) -> None:
    """An impossible act is answered with a sentence, and nothing else happens."""
    assert said in site.act(name, **form)


def test_a_long_body_is_no_form(site: Site) -> None:
    """A body that is too long is refused, and nothing of it is kept."""
    assert site.post({"act": "look", "key": "x" * 20_000}, {}).status == 403


def test_a_body_of_a_length_beyond_all_numbers_is_no_form(settings: Settings) -> None:
    """A length of more digits than Python reads is refused as any body that is too long."""
    answered: list[str] = []
    asked = {"REQUEST_METHOD": "POST", "PATH_INFO": "/operate", "CONTENT_LENGTH": "9" * 5_000}
    given = settings.model_copy(update={"health_token": SecretStr(TOKEN)})
    with Stillroom(given, dispatch=NoDispatch()) as room:
        environ = asked | {"HTTP_AUTHORIZATION": BASIC["Authorization"]}
        list(HealthWSGI(room)(environ, lambda status, *_: answered.append(status)))
    assert answered == ["403 Forbidden"]


def test_every_act_can_be_reached() -> None:
    """Every act is reached from the top of the page or from a row of another act's list."""
    offered = {name for names in GROUPS.values() for name in names}
    assert offered | {"end_session", "retry", "drop"} == set(ACTS)
