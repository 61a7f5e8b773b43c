"""The page at /status tells each caller what it may see, and looks right in a real Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.validate import validator

import pytest

import redis
from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.health.past import Pattern
from stillroom.health.report import (
    CacheStats,
    Connection,
    Figures,
    Limits,
    LimitStats,
    LoadError,
    LoaderStats,
    Report,
    RuleStats,
    Server,
    Snapshot,
    TaskStats,
    WorkerStats,
)
from stillroom.settings import LOOPBACK
from stillroom.web import HealthASGI, HealthWSGI
from stillroom.web.status import HEADERS, render, view_of
from stillroom.web.status.choices import CHOICES, Choice
from stillroom.web.status.document import STYLE
from stillroom.web.status.figures import PER_MIN
from tests.support.browser import CHROMIUM, DESKTOP, NARROW, PHONE, Browser
from tests.support.crowd import PATIENT
from tests.support.status import (
    LIMIT,
    SPIKE_PER_S,
    a_day,
    a_report,
    a_week,
    advice,
    patterns,
    seed,
    seed_patterns,
)
from tests.support.web import ask, serving_asgi, serving_wsgi

NOW = 1_800_001_500.0
ROOT = Path(__file__).parent.parent.parent
ARTEFACTS = Path(os.environ.get("ARTEFACTS", ROOT / "artefacts"))
TOKEN = "a-canary-token-for-operators"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
STRANGER = {"X-Forwarded-For": "203.0.113.7"}


class Outline(HTMLParser):
    """The parts of the page's structure that these tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]

    def says(self, chart: str) -> str:
        """Return the sentence of a chart for a reader who cannot see it."""
        return next(
            label
            for svg in self.all("svg")
            if (label := svg.get("aria-label") or "").startswith(chart)
        ).replace("\u202f", " ")


def page(history: Any = (), found: Any = (), **changes: Any) -> str:
    """Render the page of a report like the last snapshot of a day."""
    report = a_report(a_day(NOW, minutes=2)[-1], **changes)
    return render(report, history, found, now=NOW)


def away() -> Report:
    """Return the report of a Redis that does not answer."""
    connection = Connection(is_up=False, breaker="open", error="refused")
    server = Server(name="redis", roles=("cache", "state"), connection=connection)
    found = advice("fail", code="away", component="redis:connection", what="Redis is away.")
    return Report(time=NOW, status="fail", servers=(server,), advice=(found,))


# What it says


def figures() -> Figures:
    """Return figures of a quarter of an hour, with names that no page should take for markup."""
    loaders = (
        LoaderStats(name="<b>page", hits=900, stale=50, misses=50, hit_ratio=0.95, loads=50, load_errors=3,
                    load_p50_ms=4.2, load_p95_ms=180.0, refresh_lag_s=1.5),
        LoaderStats(name="shop.views.page.<locals>.load", loads=7),
    )  # fmt: skip
    errors = (LoadError(name="<b>page", kind="OSError", place="shop.db:41", at=NOW - 60),)
    limits = Limits(
        each=(LimitStats(name="auth", checks=40, denials=3, cached=1),),
        rules=(RuleStats(name="hammer", patterns=2, bans=1),),
    )
    return Figures(minutes=15, cache=CacheStats(loaders=loaders, errors=errors), limits=limits)


def test_loaders_limits_and_rules_are_named() -> None:
    """Loaders, limits and rules are named with good values; the lookups of an unregistered function
    are unknown, not 0.
    """
    report = a_report(a_day(NOW, minutes=2)[-1])
    html = render(report, (), (), now=NOW, figures=figures())
    shown = Outline(html).text.replace("\u202f", " ")
    for said in (
        *("<b>page", "OSError at shop.db:41, 1 min ago", "0.18 s", "95 %", "In the last 15 min."),
        *("Good: no load fails", "auth", "hammer", "Rules of abuse"),
    ):
        assert said in shown
    row = shown.partition("<locals>.load")[2]
    assert row.startswith("––––7")
    assert "<b>page" not in html
    assert "Unknown: what was counted" in render(report, (), (), now=NOW)
    not_told = Figures(minutes=15, cache=CacheStats(errors=()), limits=Limits(banned=0))
    html = render(report, (), (), now=NOW, figures=not_told)
    assert html.count("Unknown: what was counted") == 2, "what is unknown is not unused"
    unused = Figures(minutes=15, cache=CacheStats(loaders=()), limits=Limits(each=()))
    shown = render(report, (), (), now=NOW, figures=unused).replace("\u202f", " ")
    assert "None was used in the last 15 min." in shown


def test_it_begins_with_the_verdict_and_what_to_do() -> None:
    """The page begins with the verdict in words, the worst first, and what to do."""
    assert "All is well" in page()
    assert "There is nothing to do." in page()
    warned = page(status="warn", advice=(advice(since=NOW - 1_500),))
    assert "1 thing to look at" in warned
    assert "Raise maxmemory" in warned
    assert "(25\u202fmin ago)" in warned
    failing = page(status="fail", advice=(advice("fail"), advice(), advice()))
    assert "1 failure to mend, 2 more to look at" in failing
    assert '<li class="tile fail">' in failing
    assert "<title>1 failure to mend" in failing


def test_unknown_is_a_dash_and_never_0() -> None:
    """Where nothing can be read every tile and chart shows a dash and never 0."""
    outline = Outline(render(away(), None, None, now=NOW))
    main = outline.text.partition("Now")[2]
    assert "–" in main
    assert not re.search(r"\b0\b", main)
    assert "which does not answer" in main
    assert "unknown" in main
    assert not outline.all("figure")
    within = {a["href"] for a in outline.all("a") if not (a["href"] or "").startswith("?")}
    assert within == {"#findings"}, "no dead link"


def test_the_first_minute_has_a_page_too() -> None:
    """Without any snapshot the page shows what is known now and says what is missing."""
    outline = Outline(page())
    assert not outline.all("figure")
    assert "No snapshot yet" in outline.text
    within = {a["href"] for a in outline.all("a") if not (a["href"] or "").startswith("?")}
    assert within == {"#findings"}, "no tile leads to a chart that is not there"
    assert "No pattern was found." in outline.text


@pytest.mark.parametrize("two_servers", [False, True])
def test_each_picture_says_in_a_sentence_what_it_shows(two_servers: bool) -> None:
    """Each chart says in a sentence its current value and range, or for how long it has none."""
    day = a_day(NOW, two_servers=two_servers)
    outline = Outline(render(a_report(day[-1]), day, patterns(NOW), now=NOW))
    name = "Memory, cache" if two_servers else "Memory"
    says = outline.says(f"{name}: now")
    assert re.fullmatch(
        rf"{name}: now \d+ MB of 1 GB, in 24 h between \d+ MB and \d+ MB\."
        r" No snapshot for 13 min\." + (r" A server was away for 12 min\." if two_servers else ""),
        says,
    ), says
    assert "hit now" in outline.says("Cache lookups")
    for svg in outline.all("svg"):
        assert (
            svg.get("aria-hidden") == "true" or svg.get("aria-label") or svg.get("class") == "plot"
        )


def test_every_chart_has_its_numbers_in_a_table() -> None:
    """Every chart has its numbers in a table of hours, the newest first, that opens by keyboard."""
    day = a_day(NOW)
    outline = Outline(render(a_report(day[-1]), day, [], now=NOW))
    assert len(outline.all("details")) == len(outline.all("figure")) == 9
    assert len(outline.all("tbody")) == 9
    assert len(outline.all("tr")) == 9 * (1 + 25)


def test_every_chart_says_what_is_good() -> None:
    """Every chart says what a good value is."""
    day = a_day(NOW)
    html = render(a_report(day[-1]), day, [], now=NOW)
    goods = re.findall(r'<p class="good">Good: ([^<]+)</p>', html.partition("charts")[2])
    assert len(goods) == 9
    assert all(good.endswith(".") for good in goods)
    assert len(set(goods)) == 9


@pytest.mark.parametrize("choice", CHOICES)
def test_the_page_shows_the_time_that_was_asked_for(choice: Choice) -> None:
    """The axis, sentences and tables are of the time that was asked for, 15 minutes to 7 days."""
    week = [one for one in a_week(NOW) if one.time > NOW - choice.seconds]
    every = int(choice.every // 60)
    history = week[::every]
    view = view_of(f"for={choice.name}")
    html = render(a_report(week[-1]), history, [], now=NOW, view=view, since=NOW - 9e6)
    outline = Outline(html)
    assert f"The last {choice.said}" in outline.text
    assert f"in {choice.said} between" in outline.says("Memory: now")
    (current,) = [a for a in outline.all("a") if a.get("aria-current")]
    assert current["href"] == (f"?for={choice.name}#charts" if choice.name != "24h" else "?#charts")
    labels = re.findall(r'class="tick time">([^<]+)<', html.partition("</figure>")[0])
    assert 2 <= len(labels) <= 8, labels
    rows = html.partition("</table>")[0].count("<tr>") - 1
    assert 10 <= rows <= 25
    assert len(html) < 150_000


def test_a_young_system_shows_what_it_has() -> None:
    """The charts of a young system begin with its first snapshot, and nothing before it is hatched."""
    day = a_day(NOW, minutes=9)
    html = render(a_report(day[-1]), day, [], now=NOW, since=day[0].time)
    outline = Outline(html)
    assert "The last 9 min" in outline.text.replace("\u202f", " ")
    assert "Nothing was measured before that." in outline.text
    assert "No snapshot for" not in outline.says("Memory: now")
    assert 'class="gap"' not in html
    old = render(a_report(day[-1]), day, [], now=NOW, since=NOW - 200_000)
    assert 'class="gap"' in old, "an old system that was off has a gap"


def test_workers_are_shown_by_name() -> None:
    """Each worker is shown by name with queues, threads, time, rate and failures; an unknown figure is a dash."""
    workers = (
        WorkerStats(
            name="refresh-1-7",
            seen_s=3,
            queues=("stillroom.refresh",),
            threads=8,
            busy=2,
            up_s=3_700,
            done=1_204,
            failed=3,
            per_min=41.5,
        ),
        WorkerStats(name="old-9", seen_s=200),
    )
    report = a_report(a_day(NOW, minutes=2)[-1])
    tasks = TaskStats(workers=1, crew=workers)
    html = render(report.model_copy(update={"tasks": tasks}), [], [], now=NOW)
    text = Outline(html.partition('id="workers"')[2].partition("</section>")[0]).text
    text = text.replace("\u202f", " ")
    for said in ("refresh-1-7", "refresh", "3 s ago", "2 of 8", "41.5", "1,204", "1 h 2 min"):
        assert said in text
    assert "3 min ago: gone?" in text
    assert text.count("–") == 6
    none = render(report.model_copy(update={"tasks": TaskStats(crew=())}), [], [], now=NOW)
    assert "No worker was seen in the last ten minutes." in none


def test_patterns_tell_what_was_done_and_what_would_have_been() -> None:
    """A pattern of a rule in shadow is shown as one that would have banned."""
    text = Outline(page(found=patterns(NOW))).text.replace("\u202f", " ")
    assert "banned for 21 min" in text
    assert "would have been banned for 5 min shadow" in text
    assert "not banned: too many bans in that minute" in text
    assert "2001:db8:7::/48" in text


def test_nothing_from_outside_becomes_markup() -> None:
    """Text with every special character of HTML is shown as that text."""
    evil = "</style><script>alert(1)</script>\"'&<i>"
    found = advice(what=evil, good=evil, todo=evil, component=f"redis:{evil}")
    pattern = Pattern(rule=evil, subject=evil, count=1, last=NOW, action=evil, shadow=True)
    html = page(found=[pattern], advice=(found,), release=evil, status="warn")
    outline = Outline(html)
    assert outline.all("script", "i") == []
    assert html.count("</style>") == 1
    assert outline.text.count(evil) >= 7


def test_only_a_web_address_becomes_a_link() -> None:
    """Only a web address becomes a link, because Flower's address is a setting."""
    report = a_report(a_day(NOW, minutes=2)[-1])
    linked = render(report, [], [], flower_url='https://flower/"x', now=NOW)
    assert {"href": 'https://flower/"x', "rel": "noreferrer"} in Outline(linked).all("a")
    refused = render(report, [], [], flower_url="javascript:alert(1)", now=NOW)
    assert "javascript" not in refused


def test_its_own_style_is_all_that_the_browser_may_use() -> None:
    """The page allows its one style sheet by hash, and no script, style attribute or other host."""
    day = a_day(NOW)
    html = render(a_report(day[-1], advice=(advice(),)), day, patterns(NOW), now=NOW)
    policy = dict(HEADERS)["Content-Security-Policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    outline = Outline(html)
    assert not any("style" in attributes or "src" in attributes for _, attributes in outline.tags)
    assert not outline.all("script", "img", "form", "iframe")
    assert "url(" not in STYLE.replace("url(#hatch)", "")
    assert len(html) < 150_000


def test_headings_are_in_order_and_names_are_unique() -> None:
    """Headings are in order and names are unique, for screen readers and links."""
    day = a_day(NOW)
    outline = Outline(render(a_report(day[-1], advice=(advice(),)), day, patterns(NOW), now=NOW))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {href[1:] for a in outline.all("a") if (href := a["href"] or "").startswith("#")}
    assert targets <= set(ids)


@pytest.mark.parametrize(
    ("query", "seconds"),
    [("every=30", 30), ("a=1&every=60", 60), ("", None), ("every=4", None), ("every=3601", None),
     ("every=-30", None), ("every=1e3", None), ("every=٣٠", None), ("every=" + "9" * 9999, None)],
)  # fmt: skip
def test_it_reloads_only_for_who_asks(query: str, seconds: int | None) -> None:
    """The page reloads by itself only for a reader who asked for it."""
    view = view_of(query)
    assert view.reload_s == seconds
    day = a_day(NOW, minutes=2)
    html = render(a_report(day[-1]), day, [], now=NOW, view=view)
    assert ('http-equiv="refresh"' in html) == (seconds is not None)
    assert (">stop<" in html) == (seconds is not None)


def test_any_snapshot_can_be_drawn() -> None:
    """A snapshot that is empty, failed or full of absurd numbers can be drawn."""
    empty = Snapshot(time=NOW - 60, status="fail", servers=(), error="redis: timeout")
    wild = a_day(NOW, minutes=5)[0]
    operations = wild.servers[0].redis.operations.model_copy(update={"per_s": 1e300})  # type: ignore[union-attr]
    info = wild.servers[0].redis.model_copy(update={"operations": operations})  # type: ignore[union-attr]
    server = wild.servers[0].model_copy(update={"redis": info})
    html = page([wild.model_copy(update={"servers": (server,)}), empty])
    assert not re.search(r"\b(nan|inf)\b", html)
    assert "A server was away for 1\u202fmin" in html


# Over HTTP


@pytest.fixture
def history(client: Any, server: EmbeddedServer) -> list[Snapshot]:
    """Write a day of snapshots to Redis."""
    keys = Stillroom(Settings(redis_url=server.url)).keys
    day = a_day(time.time())
    seed(client, keys.health, day)
    seed_patterns(client, keys.abuse_log, patterns(time.time()))
    client.xadd(keys.abuse_log, {"not": "a pattern"})
    return day


def settings_for(server: EmbeddedServer, **changes: Any) -> Settings:
    given = {"redis_url": server.url, "health_token": TOKEN, "release": "shop 7"}
    given |= {"health_networks": LOOPBACK}
    return Settings(**given | PATIENT | changes)


def basic(password: str) -> dict[str, str]:
    """Return the header that a browser sends once its user typed a password."""
    return {"Authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"}


def check_who_may_see(port: int) -> None:
    for headers, status in (
        ({}, 200),
        (BEARER | STRANGER, 200),
        (basic(TOKEN) | STRANGER, 200),
        (basic("wrong") | STRANGER, 401),
        ({"Authorization": "Basic ~"} | STRANGER, 401),
        (STRANGER, 401),
    ):
        answer = ask(port, "/status?every=30", headers=headers)
        assert answer.status == status
        assert answer.one("cache-control") == "no-store"
        assert (b"203.0.113.77" in answer.body) == (status == 200)
        assert (b"Reloads every 30" in answer.body) == (status == 200)
        assert TOKEN.encode() not in answer.body
    assert answer.one("www-authenticate").startswith("Basic "), "a browser asks for a password"
    assert ask(port, "/status", method="HEAD").body == b""
    assert ask(port, "/status", method="POST").status == 405


def test_operators_see_it_and_nobody_else_wsgi(server: EmbeddedServer, history: Any) -> None:
    """Over WSGI operators see the page with the token or from their network; a stranger learns nothing."""
    with Stillroom(settings_for(server), dispatch=NoDispatch()) as room:
        with serving_wsgi(validator(HealthWSGI(room))) as port:
            check_who_may_see(port)


def test_operators_see_it_and_nobody_else_asgi(server: EmbeddedServer, history: Any) -> None:
    """Over ASGI operators see the page with the token or from their network; a stranger learns nothing."""
    room = AsyncStillroom(settings_for(server), dispatch=NoDispatch())
    with serving_asgi(HealthASGI, room) as port:
        check_who_may_see(port)


def test_secrets_are_not_on_it(server: EmbeddedServer, history: Any) -> None:
    """Passwords, session tokens, keys, values and the server's address are not on the page."""
    changes = {"session_peppers": "canary-pepper-" + "x" * 32}
    with Stillroom(settings_for(server, **changes), dispatch=NoDispatch()) as room:
        token = room.sessions.create("canary-user", {"canary-field": "canary-value"})
        room.cache.set("canary-key", "canary-value", tags=["canary-tag"])
        with serving_wsgi(validator(HealthWSGI(room))) as port:
            body = ask(port, "/status").body.decode()
    assert "All is well" in body or "to look at" in body
    address = server.url.rpartition("/")[2] or server.url
    for secret in ("canary", token.token, server.url, address.rpartition(":")[2] or address):
        assert secret not in body


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_the_page_is_there_while_redis_is_not(
    own_server: EmbeddedServer, usual_deadlines: None, fault: str
) -> None:
    """When Redis is away the page answers 200, says so, and says what to do and what is unknown."""
    settings = Settings(redis_url=own_server.url)
    with (
        Stillroom(settings, dispatch=NoDispatch()) as room,
        serving_wsgi(validator(HealthWSGI(room))) as port,
    ):
        getattr(own_server, fault)()
        answer = ask(port, "/status")
    assert answer.status == 200
    text = answer.body.decode()
    assert "does not serve this process" in text
    assert "which does not answer" in text
    assert "in Redis, which does not tell them" in text


# In a browser


class Seen(NamedTuple):
    """The page in Chromium, and the day it was drawn from."""

    browser: Browser
    url: str
    day: list[Snapshot]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Serve a day of a real server's stream over HTTP and open it in a real browser."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install --no-install-recommends chromium")
    limits_memory = {"maxmemory": str(LIMIT), "maxmemory-policy": "allkeys-lru"}
    with EmbeddedServer(options=limits_memory) as server:  # of which one finding tells
        settings = settings_for(server, flower_url="http://127.0.0.1:5555")
        with (
            Stillroom(settings, dispatch=NoDispatch()) as room,
            redis.Redis.from_url(server.url) as client,
        ):
            day = a_day(time.time())
            seed(client, room.keys.health, day)
            seed_patterns(client, room.keys.abuse_log, patterns(time.time()))
            minute = int(time.time()) // 60 - 2
            names = ("product", "shop.views.page.<locals>.load_everything_for_the_front_page")
            for what in ("hits", "misses", "loads", "load_errors", "took_20"):
                for name in names:
                    client.hset(room.keys.stats(minute), f"loader:{what}:{name}", 12_345)
            client.hset(room.keys.stats(minute), "limit:checks:auth", 7)
            said = {"kind": "sqlalchemy.exc.OperationalError", "place": "shop.db:41", "at": 5}
            client.hset(room.keys.errors, "product", json.dumps(said))
            at_work = WorkerStats(queues=("stillroom.refresh",), threads=8, busy=1, done=7)
            room.health.seen("refresh-1-" + "x" * 60, at_work)
            room.health.seen("maintenance-1-7")
            with serving_wsgi(validator(HealthWSGI(room))) as port:
                with Browser(tmp_path_factory.mktemp("chromium")) as browser:
                    url = f"http://127.0.0.1:{port}/status"
                    browser.open(url)
                    yield Seen(browser, url, day)


browser_test = pytest.mark.browser


@browser_test
def test_the_console_is_silent_and_nobody_else_is_asked(seen: Seen) -> None:
    """The browser's console is silent, and the page makes no request but its own."""
    said = [
        event["params"]
        for event in seen.browser.events
        if event["method"]
        in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    ]
    assert said == []
    asked = [
        event["params"]["request"]["url"]
        for event in seen.browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert seen.url in asked
    assert {url for url in asked if not url.startswith("data:")} == {seen.url}


def drawn(seen: Seen, figure: str, path: str = "path.line") -> dict[str, float]:
    """Return the box of a chart's path in minutes and percent, and its number of pieces."""
    script = f"""(() => {{
        const path = document.querySelector('#{figure} {path}'), box = path.getBBox();
        const {{width, height}} = path.getBoundingClientRect();
        return {{left: box.x, right: box.x + box.width, top: box.y, bottom: box.y + box.height,
                 width, height, pieces: path.getAttribute('d').split('M').length - 1}};
    }})()"""
    return dict(seen.browser.run(script))


def highest(day: list[Snapshot], get: Any) -> float:
    return float(max(get(one) for one in day))


@browser_test
def test_charts_are_drawn_from_the_stream(seen: Seen) -> None:
    """The highest point of each chart is the stream's highest number, and a gap is a gap."""
    seen.browser.resize(*DESKTOP)
    memory = drawn(seen, "memory-redis")
    used = highest(seen.day, lambda one: one.servers[0].redis.memory.used)
    assert memory["top"] == pytest.approx(100 - used / LIMIT * 100, abs=0.1)
    assert memory["pieces"] == 2, "twelve minutes are missing"
    assert memory["left"] < 15, "it begins in the first hundredth of the day"
    assert memory["right"] > 1_437
    assert memory["width"] > 200
    operations = drawn(seen, "operations")
    assert operations["top"] == pytest.approx(100 - SPIKE_PER_S / 10_000 * 100, abs=0.1)
    denials, most = drawn(seen, "denials"), highest(seen.day, lambda one: one.limits.denials)
    assert denials["top"] == pytest.approx(100 - most / PER_MIN.top(most) * 100, abs=0.1)
    lookups = drawn(seen, "lookups", "path.area.s1")
    most = highest(seen.day, lambda one: one.cache.hits + one.cache.stale + one.cache.misses)
    assert lookups["top"] == pytest.approx(100 - most / PER_MIN.top(most) * 100, abs=0.1)
    for figure in ("clients", "lag", "sessions", "banned"):
        assert drawn(seen, figure)["height"] > 20, figure
    assert drawn(seen, "waiting", "path.area")["height"] > 20


# The ratio of WCAG 2.2 (relative luminance), of every text and line against what is painted below it.
CONTRASTS = """(() => {
    const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
    const ratio = (one, other) => {
        const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    const note = (element, colour, least) =>
        found.push([ratio(rgb(colour), ground(element)), least, element.outerHTML.slice(0, 80)]);
    for (const element of document.querySelectorAll('body *')) {
        const style = getComputedStyle(element);
        const hasText = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (element.matches('svg text')) note(element, style.fill, 4.5);
        else if (hasText) note(element, style.color, 4.5);
        if (element.matches('.line, line.limit, line.base, .icon')) note(element, style.stroke, 3);
        if (element.matches('.area, circle[r="3"]')) note(element, style.fill, 3);
    }
    return found;
})()"""


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(seen: Seen, scheme: str) -> None:
    """Contrast is 4.5 to 1 for text and 3 to 1 for lines, areas and signs in both schemes (WCAG AA)."""
    seen.browser.prefer(prefers_color_scheme=scheme)
    grounds = seen.browser.run("getComputedStyle(document.body).backgroundColor")
    assert (grounds == "rgb(246, 245, 242)") == (scheme == "light")
    found = seen.browser.run(CONTRASTS)
    assert len(found) > 150
    assert [line for line in found if line[0] < line[1]] == []


@browser_test
def test_all_that_can_be_used_is_reached_by_tab(seen: Seen) -> None:
    """Tab reaches everything usable in the page's order, the skip link first, and shows the focus."""
    browser = seen.browser
    browser.open(seen.url)
    wanted = browser.run(
        "(() => { window.all = [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')];"
        " return all.length; })()"
    )
    assert wanted > 15
    reached = []
    for _ in range(wanted):
        browser.press_tab()
        reached.append(browser.run("all.indexOf(document.activeElement)"))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == list(range(wanted))


@browser_test
def test_the_numbers_open_by_keyboard(seen: Seen) -> None:
    """Enter on 'In numbers' shows its table."""
    browser = seen.browser
    browser.open(seen.url)
    browser.run("document.querySelector('#memory-redis summary').focus()")
    browser.press_enter()
    assert browser.run("document.querySelector('#memory-redis table').checkVisibility()")


@browser_test
def test_a_screen_reader_finds_every_picture_by_its_sentence(seen: Seen) -> None:
    """Chromium's accessibility tree has nine charts and six sparklines, each an image with a name."""
    nodes = seen.browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img")]
    names = [image["name"]["value"] for image in images]
    assert len(names) == 15
    assert all(" 24 h" in name or "unknown" in name for name in names), names


@browser_test
@pytest.mark.parametrize("width", [NARROW, PHONE, DESKTOP])
def test_nothing_is_wider_than_the_screen(seen: Seen, width: tuple[int, int]) -> None:
    """Nothing is wider than the screen down to 320 pixels, and no label leaves its card."""
    browser = seen.browser
    browser.resize(*width)
    browser.open(seen.url)
    long_word = "p => p.append(' ', 'W'.repeat(80))"  # as the names of a setting or a loader are
    told = browser.run(f"[...document.querySelectorAll('.findings p')].map({long_word}).length")
    assert told > 0
    assert browser.run("document.documentElement.scrollWidth") <= width[0]
    outside = browser.run(
        "[...document.querySelectorAll('figure, .tile')].flatMap(card => {"
        " const {left, right, top, bottom} = card.getBoundingClientRect();"
        " return [...card.querySelectorAll('text, p, h3, li, .state')].filter(one => {"
        "   const box = one.getBoundingClientRect();"
        "   return box.width && (box.left < left || box.right > right || box.top < top || box.bottom > bottom);"
        " }).map(one => one.outerHTML.slice(0, 90)); })"
    )
    assert outside == []


@browser_test
@pytest.mark.parametrize("width", [NARROW, PHONE])
def test_tables_can_be_read_on_a_phone(seen: Seen, width: tuple[int, int]) -> None:
    """On a phone each value of each row is visible beside its name, without scrolling sideways."""
    browser = seen.browser
    browser.resize(*width)
    browser.open(seen.url)
    cut = browser.run(
        "[...document.querySelectorAll('.stacks')].flatMap(table => {"
        " const card = table.getBoundingClientRect();"
        " const cells = [...table.querySelectorAll('tbody td, tbody th')];"
        " return [table, ...cells, ...cells.flatMap(cell => [...cell.querySelectorAll('*')])].filter(one => {"
        "   const box = one.getBoundingClientRect();"
        "   return box.left < card.left || box.right > card.right + 0.5 || box.right > innerWidth"
        "     || one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0;"
        " }).map(one => one.outerHTML.slice(0, 90)); })"
    )
    assert cut == []
    names = browser.run(
        "[...document.querySelectorAll('#abuse ~ .stacks tbody tr:first-child > *')]"
        ".map(cell => getComputedStyle(cell, '::before').content)"
    )
    assert names == ['"When"', '"Rule"', '"Who"', '"Events"', '"Done"']
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in nodes]
    assert roles.count("table") >= 2
    assert roles.count("columnheader") >= 5


@browser_test
def test_nothing_moves_for_who_wants_no_motion(seen: Seen) -> None:
    """Scrolling to a chart does not move for a reader who wants no motion."""
    script = "getComputedStyle(document.documentElement).scrollBehavior"
    seen.browser.prefer(prefers_reduced_motion="no-preference")
    assert seen.browser.run(script) == "smooth"
    seen.browser.prefer(prefers_reduced_motion="reduce")
    assert seen.browser.run(script) == "auto"


@browser_test
def test_pictures_are_kept(seen: Seen) -> None:
    """Pictures of the page, desktop and phone, light and dark, are kept in $ARTEFACTS or artefacts/."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    browser = seen.browser
    browser.open(seen.url)
    for name, screen in (("desktop", DESKTOP), ("phone", PHONE)):
        browser.resize(*screen)
        for scheme in ("light", "dark"):
            browser.prefer(prefers_color_scheme=scheme)
            picture = ARTEFACTS / f"status-{name}-{scheme}.png"
            browser.picture(picture)
            width = int.from_bytes(picture.read_bytes()[16:20], "big")
            assert screen[0] - 20 <= width <= screen[0], "a scrollbar at most is missing"
