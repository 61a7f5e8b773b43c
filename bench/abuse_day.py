"""Does anybody get banned who only lives his life? And who attacks, is he caught? A day with every rule armed.

A day goes by on a real server whose clock is moved a minute at a time. Every request goes through the middleware as
from the network, with its address and its headers; what it makes of it goes into the stream, and a worker's scan
reads that each minute. Nothing is in shadow: a ban is a ban, and who is banned gets 429.

Ordinary are families behind one address each, an office, a mobile carrier whose 65,536 customers share a /48,
pages that poll with a cookie whose session has ended, a hot-linked image that is gone, a page of ours with broken
images, and a crawler that keeps to robots.txt. Attacks come at their hours. The promises at the end: no ban of the
ordinary, and each attack seen by its rule, and banned where the rule bans.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from bench.report import Promise, Section, Table
from bench.stage import PATIENT, Effort
from stillroom import AUTH, DEFAULT, NoDispatch, Route, Routes, Settings, Stillroom
from stillroom.abuse.rules import BUILT_IN
from stillroom.sessions.token import make_token
from stillroom.web.wsgi import StillroomMiddleware
from tests.support.clocked import ClockedServer

SEED = 7
COOKIE = "__Host-sid"
REFUSED = 429
PAGES = 300  # of the shop
OPEN = range(7 * 60, 24 * 60)  # minutes in which people are awake
BUSY = (8 * 60, 12 * 60 + 15, 20 * 60)  # the peaks

Minute = int


class Shop:
    """The app behind the middleware: pages, a login, and what is not there."""

    def __init__(self, room: Stillroom) -> None:
        self.room = room
        self._served = StillroomMiddleware(self._app, room, routes=ROUTES)
        self.statuses: Counter[int] = Counter()

    def get(
        self, address: str, path: str, user: str = "", good: bool = True, **headers: str
    ) -> int:
        """Send one request, and return the status it is answered with."""
        environ = {
            "REQUEST_METHOD": "POST" if user else "GET",
            "PATH_INFO": path,
            "REMOTE_ADDR": address,
            "wsgi.url_scheme": "https",
            "login": (address, user, good),
            **{f"HTTP_{name.upper()}": value for name, value in headers.items()},
        }
        said: list[str] = []
        body = self._served(environ, lambda status, *_: said.append(status))
        list(body)
        if hasattr(body, "close"):
            body.close()
        status = int(said[0][:3])
        self.statuses[status] += 1
        if status == REFUSED and not self.statuses[status] % 10:
            self._let_denials_pass()
        return status

    def _let_denials_pass(self) -> None:
        """Forget the denials: a process remembers them for five seconds, and here a minute is sent at once."""
        for denial in self.room._limits_body._denials.found.values():
            denial.until = 0.0

    def _app(self, environ: Any, start_response: Any) -> list[bytes]:
        path = environ["PATH_INFO"]
        if path == "/login":
            address, user, good = environ["login"]
            self.room.abuse.report(
                "auth_ok" if good else "auth_fail", ip=address, user=user, route=path
            )
            start_response("200 OK" if good else "401 Unauthorized", [])
        elif path == "/account":
            found = environ["stillroom.session"].user_id
            start_response("200 OK" if found else "401 Unauthorized", [])
        else:
            start_response(
                "200 OK" if path.startswith("/p/") or path == "/" else "404 Not Found", []
            )
        return [b""]


ROUTES = Routes([Route("/login", [AUTH], count="failures")], default=[DEFAULT])
BROWSER = {"sec_fetch_site": "same-origin", "sec_fetch_dest": "document"}
IMAGE = {"sec_fetch_site": "same-origin", "sec_fetch_dest": "image"}
ICONS = ("/favicon.ico", "/apple-touch-icon.png", "/apple-touch-icon-120x120-precomposed.png")


class Traffic:
    """Somebody's day: what is asked for in each minute of it."""

    name = ""
    subjects: tuple[str, ...] = ()  # whose bans are its

    def __init__(self, shop: Shop, dice: random.Random) -> None:
        self.shop = shop
        self.dice = dice
        self.requests = 0
        self.refused = 0

    def at(self, minute: Minute) -> None:
        """Send the requests of one minute."""
        raise NotImplementedError

    def ask(self, address: str, path: str, **given: Any) -> int:
        status = self.shop.get(address, path, **given)
        self.requests += 1
        self.refused += status == REFUSED
        return status

    def browse(self, address: str, pages: int) -> None:
        for _ in range(pages):
            self.ask(address, f"/p/{self.dice.randrange(PAGES)}", **BROWSER)

    def log_in(self, address: str, user: str, mistakes: int) -> None:
        for _ in range(mistakes):
            self.ask(address, "/login", user=user, good=False)
        self.ask(address, "/login", user=user)

    def chance(self, share: float) -> bool:
        return self.dice.random() < share


def peak(minute: Minute) -> float:
    """Return how busy the shop is at a minute, 0 to 1."""
    if minute % 1_440 not in OPEN:
        return 0.02
    return 0.15 + 0.85 * max(0.0, 1 - min(abs(minute % 1_440 - at) for at in BUSY) / 120)


class Families(Traffic):
    name = "families behind one address"

    def __init__(self, shop: Shop, dice: random.Random) -> None:
        super().__init__(shop, dice)
        self.homes = {f"203.0.113.{n}": dice.randint(1, 5) for n in range(1, 61)}
        self.subjects = tuple(self.homes)

    def at(self, minute: Minute) -> None:
        for home, people in self.homes.items():
            awake = sum(self.chance(0.12 * peak(minute)) for _ in range(people))
            self.browse(home, sum(self.dice.randint(1, 12) for _ in range(awake)))
            if awake and self.chance(0.1):
                self.log_in(home, f"{home} {awake}", self.dice.choice((0, 0, 0, 1, 1, 2)))
            if awake and self.chance(0.1):
                for icon in ICONS:
                    self.ask(home, icon, **IMAGE)
                self.ask(home, f"/gone/{self.dice.randrange(40)}", **BROWSER)


class Office(Traffic):
    name = "an office of forty, logging in at nine"
    subjects = ("198.51.100.40",)

    def at(self, minute: Minute) -> None:
        (address,) = self.subjects
        working = 9 * 60 <= minute % 1_440 < 17 * 60
        self.browse(address, self.dice.randint(5, 40) if working else 0)
        if minute % 1_440 in range(9 * 60, 9 * 60 + 15):
            for n in range(3):
                who = f"clerk {minute % 1_440 * 3 + n}"
                self.log_in(address, who, self.dice.choice((0, 0, 0, 0, 0, 0, 1)))


class Carrier(Traffic):
    """Everybody has a /64 of his own, and all of them are in one /48."""

    name = "a mobile carrier's /48"
    subjects = ("2a01:598:8::/48",)
    crowd = 26  # that come in a minute, at most

    def at(self, minute: Minute) -> None:
        for _ in range(int(self.crowd * peak(minute))):
            self._visit(f"2a01:598:8:{self.dice.randrange(65_536):x}::1")

    def _visit(self, address: str) -> None:
        self.browse(address, self.dice.randint(1, 8))
        if self.chance(0.5):
            for icon in ICONS:
                self.ask(address, icon, **IMAGE)
        if self.chance(0.1):
            self.ask(address, f"/gone/{self.dice.randrange(200)}", **BROWSER)
        if self.chance(0.2):
            self.log_in(address, address, self.dice.choice((0, 0, 0, 1, 1, 2, 3)))
        if self.chance(0.04):
            self._poll(address)
        if self.chance(0.03):
            for n in range(140):  # a page with as many pictures
                self.ask(address, f"/p/{n}", **IMAGE)

    def _poll(self, address: str) -> None:
        token = make_token(3, self.dice.randbytes(32))
        for _ in range(20):
            self.ask(address, "/account", cookie=f"{COOKIE}={token}")


class Polling(Traffic):
    name = "pages that poll with an ended session"

    def __init__(self, shop: Shop, dice: random.Random) -> None:
        super().__init__(shop, dice)
        self.tokens = {f"192.0.2.{n}": make_token(n, dice.randbytes(32)) for n in range(1, 5)}
        self.subjects = tuple(self.tokens)

    def at(self, minute: Minute) -> None:
        if minute % 240 < 60:
            for address, token in self.tokens.items():
                for _ in range(30):
                    self.ask(address, "/account", cookie=f"{COOKIE}={token}")


class Hotlinked(Traffic):
    name = "another site's page with our images, gone"

    def __init__(self, shop: Shop, dice: random.Random) -> None:
        super().__init__(shop, dice)
        self.subjects = tuple(f"198.18.5.{n}" for n in range(1, 201))

    def at(self, minute: Minute) -> None:
        if self.chance(peak(minute)):
            address = self.dice.choice(self.subjects)
            for n in range(30):
                self.ask(address, f"/x{n}.png", sec_fetch_site="cross-site", sec_fetch_dest="image")


class Broken(Traffic):
    name = "our own page with thirty broken images"

    def __init__(self, shop: Shop, dice: random.Random) -> None:
        super().__init__(shop, dice)
        self.subjects = tuple(f"198.19.5.{n}" for n in range(1, 201))

    def at(self, minute: Minute) -> None:
        if self.chance(peak(minute)):
            address = self.dice.choice(self.subjects)
            self.browse(address, 1)
            for n in range(30):
                self.ask(address, f"/thumb/{n}.png", **IMAGE)


class Crawler(Traffic):
    name = "a crawler that keeps to robots.txt"
    subjects = ("192.0.2.250",)

    def at(self, minute: Minute) -> None:
        (address,) = self.subjects
        if minute % 360 == 0:
            self.ask(address, "/robots.txt")
            self.ask(address, "/sitemap.xml")
        for _ in range(30):  # Crawl-delay: 2
            path = f"/old/{self.dice.randrange(5_000)}" if self.chance(0.25) else "/p/1"
            self.ask(address, path)


ORDINARY = (Families, Office, Carrier, Polling, Hotlinked, Broken, Crawler)


class Attack(Traffic):
    """From its hour on, for ten minutes."""

    rule = ""
    hour = 3
    lasts = 10

    def at(self, minute: Minute) -> None:
        if self.hour * 60 <= minute < self.hour * 60 + self.lasts:
            self.attack(minute)

    def attack(self, minute: Minute) -> None:
        raise NotImplementedError


class Stuffing(Attack):
    name, rule, subjects = "one address tries many users", "credential_stuffing", ("203.0.114.1",)

    def attack(self, minute: Minute) -> None:
        for _ in range(3):
            self.ask(self.subjects[0], "/login", user=f"u{self.dice.random()}", good=False)


class Spraying(Attack):
    name, rule = "many addresses try one user", "password_spraying"

    def attack(self, minute: Minute) -> None:
        for _ in range(3):
            self.ask(f"203.0.115.{self.dice.randint(1, 254)}", "/login", user="victim", good=False)


class Guessed(Attack):
    name, rule = "a password is guessed at last", "guessed_password"
    hour = 4

    def attack(self, minute: Minute) -> None:
        for n in range(3):
            address = f"203.0.116.{self.dice.randint(1, 254)}"
            self.ask(address, "/login", user="guessed", good=minute % 60 == 8 and n == 2)


class Scanner(Attack):
    name, rule, subjects = "asks for admin pages", "scanner", ("203.0.114.2",)

    def attack(self, minute: Minute) -> None:
        for n in range(60):
            self.ask(self.subjects[0], f"/wp-{n}.php")


class Tokens(Attack):
    name, rule, subjects = "guesses session tokens", "session_guessing", ("203.0.114.3",)

    def attack(self, minute: Minute) -> None:
        for _ in range(40):
            token = make_token(1, self.dice.randbytes(32))
            self.ask(self.subjects[0], "/account", cookie=f"{COOKIE}={token}")


class Hammer(Attack):
    name, rule, subjects = "goes on although it is denied", "hammer", ("203.0.114.4",)

    def attack(self, minute: Minute) -> None:
        for _ in range(300):
            self.ask(self.subjects[0], "/")


class Scraper(Attack):
    name, rule = "uses up its quota, minute after minute", "creeping_scraper"
    hour, lasts = 0, 60

    def attack(self, minute: Minute) -> None:
        for n in range(95):
            self.ask("203.0.114.5", f"/p/{n}")


class Rotation(Attack):
    """A /48 is 65,536 addresses that limits count apart."""

    rule, subjects = "ipv6_rotation", ("2001:db8:1::/48",)
    net = "2001:db8:1"

    def address(self) -> str:
        return f"{self.net}:{self.dice.randrange(65_536):x}::1"


class RotatingGuesses(Rotation):
    name = "a /48 guesses passwords, five from each address"

    def attack(self, minute: Minute) -> None:
        for _ in range(4):
            address = self.address()
            for _ in range(6):
                self.ask(address, "/login", user=f"u{self.dice.randrange(9)}", good=False)


class SilentGuesses(Rotation):
    name, rule = "the same, of an app that reports no failures", "ipv6_rotation"
    subjects, net = ("2001:db8:2::/48",), "2001:db8:2"

    def attack(self, minute: Minute) -> None:
        for _ in range(8):
            address = self.address()
            for _ in range(6):
                self.refused += not self.shop.room.limits.check(address, [AUTH], route="/login")
                self.requests += 1


class RotatingScanner(Rotation):
    name = "a /48 asks for admin pages, twelve from each address"
    subjects, net = ("2001:db8:3::/48",), "2001:db8:3"

    def attack(self, minute: Minute) -> None:
        for _ in range(4):
            address = self.address()
            for n in range(12):
                self.ask(address, f"/wp-{self.dice.random()}-{n}.php")


class RotatingHammer(Rotation):
    name = "a /48 goes on although it is denied"
    subjects, net = ("2001:db8:4::/48",), "2001:db8:4"
    hour = 6

    def attack(self, minute: Minute) -> None:
        for n in range(3):
            for _ in range(140):
                self.ask(f"{self.net}:{minute * 4 + n:x}::1", "/")


ATTACKS = (
    *(Stuffing, Spraying, Guessed, Scanner, Tokens, Hammer, Scraper),
    *(RotatingGuesses, SilentGuesses, RotatingScanner, RotatingHammer),
)


def run(effort: Effort) -> Section:
    minutes = 60 * effort.pick(smoke=0, quick=7, usual=24, full=24) or 5
    with tempfile.TemporaryDirectory() as folder, ClockedServer(binary=None) as server:
        rules = Path(folder) / "rules.toml"
        rules.write_text("".join(f"[rules.{name}]\nshadow = false\n" for name in BUILT_IN))
        given = {**PATIENT, "abuse_rules": rules, "ban_cap": 10_000, "ban_file": Path("/dev/null")}
        settings = Settings(redis_url=server.url, **given)
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            traffic = list(all_of_it(room))
            patterns = live_a_day(server, room, traffic, minutes)
    return section_of(traffic, patterns, minutes)


def all_of_it(room: Stillroom) -> Iterator[Traffic]:
    shop = Shop(room)
    for kind in (*ORDINARY, *ATTACKS):
        yield kind(shop, random.Random(f"{SEED} {kind.__name__}"))


def live_a_day(
    server: ClockedServer, room: Stillroom, traffic: list[Traffic], minutes: int
) -> list[dict[str, str]]:
    """Live one minute after the other. Return what was said, with what it was about and when."""
    found: list[dict[str, str]] = []
    with redis.Redis.from_url(server.url) as client:
        last = "-"
        for minute in range(minutes):
            server.set_clock(minute * 60.0)
            for one in traffic:
                one.at(minute)
            room.abuse.deliver()
            room._abuse_body.reset()  # a process may tell as many events again, a minute later
            room.abuse.scan(seconds=60)
            for name, fields in client.xrange(
                room.keys.abuse_log, min=f"({last}" if last != "-" else "-"
            ):
                last = name.decode()
                found.append({key.decode(): value.decode() for key, value in fields.items()})
                found[-1]["minute"] = str(minute)
    return found


def is_about(one: Traffic, pattern: dict[str, str]) -> bool:
    subject = pattern["subject"]
    if subject in one.subjects:
        return True
    return any(
        net.endswith("/48") and subject.startswith(net.removesuffix("::/48"))
        for net in one.subjects
    )


def section_of(traffic: list[Traffic], patterns: list[dict[str, str]], minutes: int) -> Section:
    table = Table(["traffic", "requests", "of them 429", "seen by", "bans", "after min"])
    innocent = [one for one in traffic if not isinstance(one, Attack)]
    attacks = [
        one for one in traffic if isinstance(one, Attack) and one.hour * 60 + one.lasts <= minutes
    ]
    for one in [*innocent, *attacks]:
        about = [pattern for pattern in patterns if is_about(one, pattern)]
        if isinstance(one, Attack) and not one.subjects:
            about += [pattern for pattern in patterns if pattern["rule"] == one.rule]
        banned = [pattern for pattern in about if pattern["action"] == "ban"]
        rules = ", ".join(sorted({pattern["rule"] for pattern in about})) or "–"
        after = "–"
        if about and isinstance(one, Attack):
            after = str(int(about[0]["minute"]) - one.hour * 60)
        figures = (f"{one.requests:,}", f"{one.refused:,}", rules, str(len(banned)), after)
        table.add(one.name, *figures)
    bans = [pattern for pattern in patterns if pattern["action"] == "ban"]
    wrongly = [pattern for pattern in bans for one in innocent if is_about(one, pattern)]
    missed = [one.name for one in attacks if not is_seen(one, patterns)]
    by = f"{minutes / 60:g} hours"
    return Section(
        name="abuse_day",
        title="A day of ordinary traffic and of attacks, with every rule armed",
        tables=[table],
        promises=[
            Promise("bans of who only lives his life", len(wrongly), 0, by=by),
            Promise(f"of {len(attacks)} attacks, missed", len(missed), 0, by=by),
        ],
        notes=[f"missed: {name}" for name in missed],
    )


def is_seen(one: Attack, patterns: list[dict[str, str]]) -> bool:
    about = [
        p for p in patterns if p["rule"] == one.rule and (not one.subjects or is_about(one, p))
    ]
    if BUILT_IN[one.rule].get("action") != "ban":
        return bool(about)
    return any(pattern["action"] == "ban" for pattern in about)
