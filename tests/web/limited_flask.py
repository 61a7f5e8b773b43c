"""The app of limited_apps.py, in Flask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flask
from flask import Blueprint, Flask, Response, redirect, request
from flask.views import MethodView

from stillroom import API, AUTH, Stillroom
from stillroom.web import Header
from stillroom.web.flask import StillroomLimits, StillroomSessions, exempt, limited
from tests.web.limited_apps import (
    GATE,
    GROUP,
    MINE,
    ONE,
    ORIGIN,
    PLACE,
    SHARED,
    TEN,
    TWO,
    is_probe,
    near_loader,
    tenant_of,
    tier,
    wrong_form,
)


@limited(TWO)
class Whole(MethodView):
    def get(self) -> str:
        return "get"

    def post(self) -> str:
        return "post"


class Parts(MethodView):
    def get(self) -> str:
        return "get"

    @limited(TWO)
    def post(self) -> str:
        return "post"


@exempt
class FreedParts(Parts): ...


def make_app(room: Stillroom, **options: Any) -> Flask:  # noqa: C901 - one view after the other
    app = Flask("limited")
    app.session_interface = StillroomSessions(room)
    StillroomLimits(app, room, **options)

    @app.after_request
    def cors(response: Response) -> Response:
        response.headers["Access-Control-Allow-Origin"] = ORIGIN
        return response

    @app.post("/guess")
    @limited(AUTH, count="failures")
    def guess() -> str:
        if request.args.get("right") != "1":
            flask.abort(401)
        return "right"

    @app.post("/form")
    @limited(AUTH, count=wrong_form)
    def form() -> Any:
        return redirect("/open", 302) if request.args.get("right") == "1" else "wrong"

    for path, given, more in (
        ("/tiers", tier, {}),
        ("/cost", TEN, {"cost": lambda request: int(request.args["n"])}),
        ("/mine", MINE, {"by": "user"}),
        ("/keyed", MINE, {"by": Header("X-API-Key")}),
        ("/tenant", MINE, {"by": tenant_of}),
        ("/shared/a", SHARED, {}),
        ("/shared/b", [SHARED], {}),
        ("/probed", ONE, {"exempt_when": is_probe}),
    ):
        app.add_url_rule(path, path, limited(given, **more)(says(path)))

    @app.get("/both")
    @limited(API, by="user")
    @limited(TWO)
    def both() -> str:
        return "both"

    @app.get("/sync/<int:number>")
    @limited(TWO)
    def sync(number: int) -> str:
        return str(number)

    @app.get("/async")
    @limited(TWO)
    async def asynchronous() -> str:
        return "7"

    @app.get("/login")
    def login() -> str:
        flask.session.login(request.args["who"])  # type: ignore[attr-defined]
        return "in"

    @app.get("/touch")
    @limited(TEN)
    def touch() -> str:
        return str(flask.session.user_id)  # type: ignore[attr-defined]

    price = near_loader(room)

    @app.get("/page")
    @limited(TEN)
    def page() -> str:
        return f"{flask.session.user_id} {sum(price(n) for n in range(5))}"  # type: ignore[attr-defined]

    @app.get("/stream")
    @limited(PLACE)
    def stream() -> Any:
        return Response(pieces())

    @app.get("/sized")
    @limited(PLACE)
    def sized() -> Any:
        return Response(lingering(), headers={"Content-Length": "3"})

    @app.get("/fails")
    @limited(PLACE)
    def fails() -> str:
        raise ZeroDivisionError

    @app.get("/open")
    def unlimited() -> str:
        return "open"

    app.add_url_rule("/class", view_func=Whole.as_view("class"))
    app.add_url_rule("/method", view_func=Parts.as_view("method"))
    group = limited(GROUP)(Blueprint("group", __name__, url_prefix="/group"))
    group.add_url_rule("/x", "x", says("x"))
    group.add_url_rule("/own", "own", limited(ONE)(says("own")))
    group.add_url_rule("/free", "free", exempt(says("free")))
    group.add_url_rule("/freed", "freed", exempt(limited(ONE)(says("freed"))))
    group.add_url_rule("/class", view_func=FreedParts.as_view("freed-class"))
    app.register_blueprint(group)
    return app


def lingering() -> Iterator[bytes]:
    yield b"all"
    GATE.wait(10)


def pieces() -> Iterator[bytes]:
    yield b"first"
    GATE.wait(10)
    yield b"second"


def says(word: str) -> Any:
    return lambda: word
