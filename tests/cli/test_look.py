"""`stillroom show`, `explain`, `loaders` and `routes` work as a person types them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cli import app, application
from tests.support.entries import age

SHOP = """
from stillroom import AUTH, Limit, Route, Routes, Stillroom
from stillroom.web.wsgi import StillroomMiddleware
room = Stillroom()
@room.cache.cached("product:{number}", ttl=600, swr=60, tags=["products"])
def product(number: int) -> dict[str, int]:
    return {"number": number}
@room.cache.cached("unused:{number}")
def unused(number: int) -> int:
    raise OSError
@room.cache.cached("page:{path}:{part}")
def page(path: str, part):
    return path
routes = Routes([Route("/login", [AUTH], methods=["POST"])], default=[Limit("shop", 100, 60, shadow=True)])
application = StillroomMiddleware(lambda environ, start: [], room, routes=routes)
"""
VIEWS = """
from flask import Flask
from stillroom import AUTH, Limit, Stillroom
from stillroom.web import Header
from stillroom.web.flask import StillroomLimits, limited
room = Stillroom()
app = Flask(__name__)
StillroomLimits(app, room, default=[Limit("rest", 9, 60)])
def tier(request): ...
def is_probe(request): ...
team = limited(Limit("team", 50, 60), by="user")
app.add_url_rule("/login", "login", team(limited(AUTH, count="failures")(lambda: "")), methods=["POST"])
app.add_url_rule("/tiers", "tiers", limited(tier, exempt_when=is_probe)(lambda: ""))
app.add_url_rule("/keyed", "keyed", limited(Limit("api", 9, 60), by=Header("X-API-Key"), cost=3)(lambda: ""))
app.add_url_rule("/<name>", "named", lambda name: name)
"""


@pytest.fixture
def shop(server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Write the app's module, as its processes and the command import it."""
    name = f"shop_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SHOP)
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("STILLROOM_LOADERS", name)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(name)
    sys.modules.pop(name).room.close()


@pytest.fixture
def run(shop: Any) -> Callable[..., str]:
    """Run a command and return what it prints."""

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, (result.output, result.exception)
        mistake = None if isinstance(result.exception, SystemExit) else result.exception
        return result.output + (repr(mistake) if mistake else "")

    return run


def test_a_key_is_shown_and_explained(run: Callable[..., str], shop: Any, client: Any) -> None:
    """A key is shown with freshness, tags, loader, age and size, and its value only with the option."""
    assert "never" in run("show", "product:7", "--json", code=1)
    assert "miss: Nothing is stored under this key." in run("explain", "product:7")
    shop.product(7)
    shown = run("show", "product:7")
    for fact in ("a hit: It is fresh.", "product", "products", "age", "fresh until"):
        assert fact in shown
    assert '{"number": 7}' not in shown
    assert '{"number": 7}' in run("show", "product:7", "--value")
    told = json.loads(run("show", "product:7", "--json"))
    assert (told["outcome"], told["cause"], told["loader"]) == ("hit", "fresh", "product")
    assert "value" not in told
    age(client, shop.room.keys.entry(b"product:7"), 601)
    assert " stale: Its ttl is over" in run("show", "product:7")
    assert "a stale" not in run("show", "product:7")
    shop.room.cache.invalidate_by_tag("products")
    said = run("explain", "product:7")
    assert said.startswith("miss: Its tag products was invalidated. It was at ")
    assert json.loads(run("explain", "product:7", "--json"))["by"] == "products"


def test_a_key_is_loaded_now(run: Callable[..., str], shop: Any) -> None:
    """A worker is asked to load a key whatever is there, by its loader; a key of no loader is refused."""
    assert "a worker was asked to load product:7 by product" in run("refresh", "product:7")
    asked = json.loads(run("refresh", "product:8", "--json"))
    assert asked == {"key": "product:8", "loader": "product"}
    queues = {one.name: one.depth for one in shop.room.health.check().tasks.queues}
    assert sum(queues.values()) == 2
    assert "no loader is known for nobody:7" in run("refresh", "nobody:7", code=1)
    shop.room.upkeep.pause("refresh", 60)
    assert "product, after the pause of refreshes" in run("refresh", "product:7")


@pytest.mark.parametrize(
    ("path", "part"),
    [("a/b", 7), ("{[]}", 7), ("a:b%", "7"), ("", None), ("x", [1, "2"]), ("x", "a:'b'")],
)
def test_what_is_loaded_is_the_call_that_has_the_key(
    run: Callable[..., str], shop: Any, path: str, part: Any
) -> None:
    """A missing key is loaded by the arguments of the call that has it, and not by the texts in it."""
    loader = shop.room.cache.loaders["page"]
    key = loader.key(loader.values((path, part), {}))
    run("refresh", key)
    shop.room.upkeep.reclaim()
    assert shop.room.cache.get(key) == path


def test_a_key_that_does_not_tell_its_arguments_is_not_loaded(
    run: Callable[..., str], shop: Any, client: Any
) -> None:
    """A key that is cut, or that no call has, orders nothing: its reader has to load it."""
    loader = shop.room.cache.loaders["page"]
    long = loader.key(loader.values(("x", "y" * 2_000), {}))
    for key in (long, "product:seven", "product:07"):
        assert "the arguments of " in run("refresh", key, code=1)
    assert client.zcard(shop.room.keys.orders) == 0


def test_a_room_that_is_elsewhere_is_told(
    run: Callable[..., str], shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command with another namespace than the app says that it looks elsewhere, and so does the check."""
    shop.product(7)
    assert "another" not in run("explain", "product:7")
    monkeypatch.setenv("STILLROOM_NAMESPACE", "other")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(application.log, "warning", lambda text, *args: said.append(text % args))
        assert "miss: Nothing" in run("explain", "product:7")
    assert "another STILLROOM_NAMESPACE than this command" in said[0]
    assert "another STILLROOM_NAMESPACE than this command" in run("check", "--strict", code=1)


def test_counts_that_are_not_known_are_no_zeros(
    run: Callable[..., str], shop: Any, client: Any
) -> None:
    """Where Redis does not tell what was counted, the command says so, and shows no loader as unused."""
    client.set(shop.room.keys.stats(int(time.time()) // 60 - 1), "no hash")
    for arguments in (("loaders",), ("loaders", "--json")):
        assert run(*arguments, code=1).startswith("what was counted is not known")


def test_a_value_is_text_whatever_it_is(run: Callable[..., str], shop: Any) -> None:
    """A stored value moves no cursor of the terminal and is not taken for markup."""
    shop.room.cache.set("[red]k", "\x1b[31m[bold]evil\u202e", tags=["\x1b]0;x\x07"])
    shown = run("show", "[red]k", "--value")
    assert "[red]k" in shown
    assert "[bold]evil" in shown
    assert not {"\x1b", "\u202e", "\x07"} & set(shown)


def test_the_loaders_are_listed_with_their_figures(run: Callable[..., str], shop: Any) -> None:
    """The loaders are listed with their keys and figures, used or not."""
    minute = shop.room.state_wire.server.now_ms() // 60_000 - 1
    for what, count in {"hits": 90, "misses": 10, "loads": 10, "took_5": 10}.items():
        shop.room.state.run(_counting(shop, minute, f"loader:{what}:product", count))
    shown = run("loaders")
    assert "product:{number}" in shown
    assert "90%" in shown
    assert "unused" in shown
    told = {one["name"]: one for one in json.loads(run("loaders", "--minutes", "5", "--json"))}
    assert (told["product"]["hit_ratio"], told["product"]["load_p50_ms"]) == (0.9, 3.5)
    assert (told["unused"]["loads"], told["unused"]["key"]) == (0, "unused:{number}")
    run("loaders", "--minutes", "120", code=2)


def _counting(shop: Any, minute: int, name: str, count: int) -> Any:
    yield [(b"HINCRBY", shop.room.keys.stats(minute), name, str(count))]


def test_a_path_without_limits_is_not_taken_for_an_app_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that no route takes by this method is told so, with the methods that one takes."""
    (tmp_path / "form_only.py").write_text(FORM_ONLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    for words, told in {
        ("/login",): "no route of form_only:app takes GET /login; one takes POST",
        ("/nothing",): "no route of form_only:app takes GET /nothing",
        ("login",): "'login': a path begins with /; did you mean /login?",
    }.items():
        done = CliRunner().invoke(app, ["routes", *words, "--app", "form_only:app"])
        assert str(done.exception) == told


FORM_ONLY = """
from fastapi import Depends, FastAPI
from stillroom import AUTH
from stillroom.web.fastapi import limited
app = FastAPI()
@app.post("/login", dependencies=[Depends(limited(AUTH))])
def login(): ...
"""


def test_the_routes_are_listed(run: Callable[..., str], shop: Any) -> None:
    """The route table is listed with the default, or one path with its limits."""
    shown = run("routes")
    for fact in ("/login", "POST", "auth 5/5m by ip", "all others", "shop 100/1m by ip in shadow"):
        assert fact in shown
    (login,) = json.loads(run("routes", "/login", "--method", "POST", "--json"))
    assert (login["path"], login["limits"][0]["name"]) == ("/login", "auth")
    (other,) = json.loads(run("routes", "/login", "--json"))
    assert other["path"] == "all others"
    of_app = json.loads(run("routes", "--app", f"{shop.__name__}:application", "--json"))
    assert [row["path"] for row in of_app] == ["/login", "all others"]


def test_a_table_is_found_behind_other_layers(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is listed wherever it stands: given to `init_app`, or behind health, an extension or a closure."""
    name = f"behind_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(BEHIND)
    monkeypatch.syspath_prepend(str(tmp_path))
    for behind in ("flask_app", "fast_app", "plain_app"):
        (row,) = json.loads(run("routes", "/login", "--app", f"{name}:{behind}", "--json"))
        assert (row["path"], row["limits"][0]["name"]) == ("/login", "auth"), behind
    module = sys.modules.pop(name)
    module.room.close()


BEHIND = """
from fastapi import FastAPI
from flask import Flask
from stillroom import AUTH, AsyncStillroom, Route, Routes, Stillroom
from stillroom.web import HealthASGI, HealthWSGI, asgi, wsgi
from stillroom.web.flask import StillroomLimits
room, awaited = Stillroom(), AsyncStillroom()
table = lambda: Routes([Route("/login", [AUTH])], default=[])
flask_app = Flask(__name__)
flask_app.add_url_rule("/login", "login", lambda: "")
room.init_app(flask_app, sessions=False, health=True, routes=table())
StillroomLimits(flask_app, room)
fast_app = FastAPI()
fast_app.add_api_route("/login", lambda: "")
limits = {"sessions": False, "routes": table()}
fast_app = HealthASGI(asgi.StillroomMiddleware(fast_app, awaited, **limits), awaited)
plain_app = HealthWSGI(wsgi.StillroomMiddleware(lambda environ, start: [], room, **limits), room)
"""


def test_the_limits_of_views_are_listed(run: Callable[..., str], tmp_path: Path) -> None:
    """What views carry is listed with its subjects, costs and the answers that count; the default is listed too."""
    name = f"views_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(VIEWS)
    shown = run("routes", "--app", f"{name}:app")
    for fact in (
        "team 50/1m by user",
        "auth 5/5m by ip",
        "failures",
        "what tier says",
        "all, unless is_probe",
        "api 9/1m by x_api_key",
        "all others",
        "rest 9/1m by ip",
    ):
        assert fact in shown, (fact, shown)
    rows = json.loads(run("routes", "/login", "--method", "post", "--app", name, "--json"))
    assert [(row["path"], [one["name"] for one in row["limits"]]) for row in rows] == [
        ("/login", ["team"]),
        ("/login", ["auth"]),
    ]
    assert {row["view"] for row in rows} == {"login"}
    (tiers, named) = json.loads(run("routes", "/tiers", "--app", name, "--json"))
    assert (tiers["limits_of"], tiers["exempt_when"], tiers["limits"]) == ("tier", "is_probe", [])
    assert (named["path"], named["limits"], named["view"]) == ("/<name>", [], "named")
    (other, default) = json.loads(run("routes", "/other", "--app", name, "--json"))
    assert (other["path"], default["limits"][0]["name"]) == ("/<name>", "rest")
    sys.modules.pop(name).room.close()


def test_an_app_without_routes_is_told(run: Callable[..., str], shop: Any) -> None:
    """An app without routes is told what was looked for and what to write."""
    assert "there is no Routes in" in run("routes", "--app", f"{shop.__name__}:room", code=1)
    assert "nothing:app: ModuleNotFoundError" in run("routes", "--app", "nothing:app", code=1)


def test_limits_are_shown_as_json(run: Callable[..., str], shop: Any) -> None:
    """The limits' names, changes and resets are shown as JSON."""
    shop.room.limits.check("203.0.113.9", shop.routes.default.limits)
    run("limits", "set", "shop", "5/1m")
    told = json.loads(run("limits", "show", "--json"))
    assert told["names"] == ["shop"]
    assert (told["changes"][0]["name"], told["changes"][0]["quota"]) == ("shop", 5)
    reset = json.loads(run("limits", "reset", "203.0.113.9", "shop", "--json"))
    assert reset == {"reset": "shop", "by": "ip", "had_used": True}
