"""The shop: a page for each idea of Stillroom. Any WSGI server serves it: `gunicorn shop.app:app`

Product and listing pages do not look at the session. So they are one round trip for the limits and one for the
value, and with Redis away they are read from the database.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple, cast

from flask import Flask, Response, abort, redirect, render_template, request, session
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from shop import cache, db
from shop.cache import room
from stillroom import AUTH, STATIC, Limit, Route, Routes
from stillroom.errors import SessionEnded, SessionStoreUnavailable
from stillroom.web import HealthWSGI, SessionCookie
from stillroom.web.flask import FlaskSession, StillroomSessions
from stillroom.web.wsgi import StillroomMiddleware

PAGES = Limit("pages", 1_000, 60)  # all else shares the default: 100 requests a minute
ROUTES = Routes(
    [
        Route("/", [PAGES], ["GET"]),
        Route("/product/{id}", [PAGES], ["GET"]),
        Route("/static/{path:path}", [STATIC]),
    ]
)
COOKIE = SessionCookie("sid", secure=False)  # http on this machine; behind https: SessionCookie()

db.prepare()
app = Flask(__name__)
app.session_interface = StillroomSessions(room, cookie=COOKIE)
limited = StillroomMiddleware(app.wsgi_app, room, routes=ROUTES, sessions=False)
app.wsgi_app = HealthWSGI(room, limited)  # type: ignore[method-assign]  # /health … /status


# Cached pages: fresh from Redis, stale while a worker reads the database, or read by this process.


@app.get("/")
def listing() -> str:
    began = time.time()
    read, brand = cache.load_listing(), request.args.get("brand")  # no visitor's text is in a key
    products = [one for one in read.value if brand in (None, one.brand)]
    return render_template("listing.html", products=products, foot=foot(read, began))


@app.get("/product/<int(max=999999999):id>")
def product(id: int) -> str:
    began = time.time()
    read = cache.load_product(id)
    return render_template("product.html", product=read.value or abort(404), foot=foot(read, began))


@app.get("/prices.csv")
def prices() -> Response:
    """Stream the prices, as long lists are streamed."""
    lines = (f"{one.name},{one.cents}\n" for one in cache.load_listing().value)
    return Response(lines, mimetype="text/csv")


@app.get("/images")
def images() -> str:
    """List the images' types, sizes and hashes, read from the content once for each version of a file."""
    names = [one.image for one in cache.load_listing().value]
    return render_template("images.html", images=map(room.cache.get_image_info, names))


class Foot(NamedTuple):
    """Tells how a page was served."""

    how: str  # fresh, stale, or loaded: by this request, or by one that it waited for
    ms: float
    process: int
    read_at: float
    read_by: int


def foot(read: cache.Read[Any], began: float) -> Foot:
    now = time.time()
    how = "fresh" if now - read.at < room.settings.ttl else "stale"
    return Foot(
        "loaded" if read.at >= began else how, (now - began) * 1000, os.getpid(), read.at, read.by
    )


# Changes: the database first; when it has committed, the caches are told.


@app.get("/admin/<int:id>")
def edit_form(id: int) -> str:
    require_user(db.ADMIN)
    return render_template("edit.html", product=db.find_product(id) or abort(404))


@app.post("/admin/<int:id>")
def edit(id: int) -> AnyResponse:
    require_user(db.ADMIN)
    if not db.update_product(id, request.form["name"], whole_number("cents")):
        abort(404)
    cache.product_changed(id)
    return redirect(f"/product/{id}", 303)


@app.post("/admin/sale")
def sale() -> AnyResponse:
    require_user(db.ADMIN)
    brand = request.form["brand"]
    if not db.reduce_prices(brand, whole_number("percent", most=90)):
        abort(404)
    cache.prices_changed(brand)
    return redirect("/", 303)


# Who is there, and what is in the cart.


@app.get("/login")
def login_form() -> str:
    return render_template("login.html")


@app.post("/login")
def log_in() -> AnyResponse | tuple[str, int] | tuple[str, int, dict[str, str]]:
    name, password = request.form["name"], request.form["password"]
    client = room.limits.client(request.remote_addr, request.headers.items())
    # First the quota, then the password: of a hundred guesses made at once five are looked at.
    attempt = room.limits.reserve(client, [AUTH], route="/login")
    if not attempt:
        return too_many(attempt.decision.status, attempt.decision.headers())
    if not db.check_password(name, password):
        room.abuse.report("auth_fail", ip=client, user=name, route="/login")
        return render_template("login.html", wrong=True), 403
    room.limits.refund(attempt)
    room.abuse.report("auth_ok", ip=client, user=name, route="/login")
    visitor().login(name, meta={"browser": request.user_agent.string[:80]})  # the cart goes along
    visitor().save()  # here, so that Redis away is answered in words
    return redirect("/account", 303)


@app.get("/account")
def account() -> str:
    user = require_user()
    devices, orders = room.sessions.list_for_user(user), db.list_orders(user)
    mine = visitor().found
    return render_template("account.html", user=user, devices=devices, mine=mine, orders=orders)


@app.post("/logout")
def log_out() -> AnyResponse:
    visitor().logout()
    return redirect("/", 303)


@app.post("/logout-everywhere")
def log_out_everywhere() -> AnyResponse:
    """End the visitor's sessions on all devices but this one."""
    room.sessions.destroy_for_user(require_user(), keep=visitor().found)
    return redirect("/account", 303)


@app.get("/cart")
def cart() -> str:
    products = {str(one.id): one for one in cache.load_listing().value}
    chosen = visitor().get("cart", {})
    items = [(products[one], count) for one, count in chosen.items() if one in products]
    return render_template("cart.html", items=items, user=visitor().user_id)


@app.post("/cart/<int(max=999999999):id>")
def add(id: int) -> AnyResponse:
    if cache.load_product(id).value is None:
        abort(404)
    if found := visitor().found:
        # Of twenty clicks at once none is lost: each is added to what the others made of the cart.
        room.sessions.mutate(found, lambda data: put_into(data, str(id)))
    else:
        visitor()["cart"] = {str(id): 1}
    return redirect("/cart", 303)


@app.post("/checkout")
def check_out() -> AnyResponse:
    user, taken = require_user(), dict[str, int]()
    if found := visitor().found:
        # Of two clicks at once one gets the cart, and the other an empty one.
        room.sessions.mutate(found, lambda data: take_out(data, taken))
        try:
            db.place_order(user, taken)
        except BaseException:  # nothing was ordered
            room.sessions.mutate(found, lambda data: put_back(data, taken))
            raise
    return redirect("/account", 303)


def visitor() -> FlaskSession:
    """Return Flask's session: read from Redis by the first look at it, written when the response begins."""
    return cast(FlaskSession, session)


def require_user(name: str | None = None) -> str:
    """Return the user who is logged in. With `name` only that user may pass, and others get 403.

    A visitor without a login is redirected to the login page.
    """
    user = visitor().user_id
    if user is None:
        abort(redirect("/login", 303))
    return user if name in (None, user) else abort(403)


def put_into(data: dict[str, Any], id: str, count: int = 1) -> None:
    data.setdefault("cart", {})[id] = data.get("cart", {}).get(id, 0) + count


def put_back(data: dict[str, Any], taken: dict[str, int]) -> None:
    for one, count in taken.items():
        put_into(data, one, count)


def take_out(data: dict[str, Any], taken: dict[str, int]) -> None:
    taken.clear()  # it is called again if somebody else was first
    taken.update(data.pop("cart", {}))


def whole_number(field: str, most: int = 1_000_000) -> int:
    text = request.form[field]
    is_number = (
        text.isascii() and text.isdigit() and len(text) < 10
    )  # Python reads none of 5,000 digits
    return int(text) if is_number and int(text) <= most else abort(400)


# What a visitor is told when something can't be.


@app.before_request
def refuse_other_sites() -> None:
    """Refuse a form on another site's page, which may not act for our visitor.

    SameSite=Lax says it too, to newer browsers.
    """
    if request.method == "POST" and request.headers.get("Sec-Fetch-Site") == "cross-site":
        abort(403)


@app.errorhandler(SessionStoreUnavailable)
def away(_: SessionStoreUnavailable) -> tuple[str, int, dict[str, str]]:
    """Answer 503, and leave the cookie as it is: nobody is logged out by this."""
    text = "We can't look up who you are just now. The shop is open; try this again in a moment."
    return render_template("message.html", title="One moment", text=text), 503, {"Retry-After": "2"}


@app.errorhandler(SessionEnded)
def ended(_: SessionEnded) -> tuple[str, int]:
    text = "Your session ended while you clicked. Log in again."
    return render_template("message.html", title="Logged out", text=text), 409


@app.errorhandler(HTTPException)
def refused(error: HTTPException) -> AnyResponse | tuple[str, int]:
    if error.code is None or error.response is not None:  # a redirection, which is no mistake
        return error.get_response()
    return render_template("message.html", title=error.name, text=error.description), error.code


def too_many(status: int, headers: dict[str, str]) -> tuple[str, int, dict[str, str]]:
    text = f"Too many attempts. The next one is possible in {headers.get('Retry-After', 'some')} seconds."
    return render_template("message.html", title="Slowly", text=text), status, headers
