"""The same page by what a user would pick: a framework alone, with the usual parts, with ours, with ours and near.

The five cached reads are made one by one, or in one call: `get_many` of the usual parts, `gather` of ours.

One session read, one moving-window limit with headers (a fixed window in Django's usual parts, which have no
other), and five cached reads. One process of the app on one CPU; its Redis, the client and our worker on the other.
In each round everybody has a turn; ratios are taken inside a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from statistics import median
from typing import NamedTuple

from bench.chart import Bar, bars
from bench.harness import Spread
from bench.page import planned
from bench.page.apps import OURS, App, Figures
from bench.report import Promise, Section, Table
from bench.stage import Effort, clear_environment

FRAMEWORKS = ["flask", "fastapi", "django"]
NAMES = {"flask": "Flask", "fastapi": "FastAPI", "django": "Django"}
PARTS = {
    "flask": "Flask-Session, Flask-Limiter, Flask-Caching",
    "fastapi": "starsessions, slowapi, cashews",
    "django": "django-redis, its sessions, django-ratelimit",
}
VARIANTS = ["bare", "usual", "batched", "ours", "gathered", "near"]
USUAL = ["usual", "batched"]
NEEDS = {
    "flask": ["flask_session", "flask_limiter", "flask_caching"],
    "fastapi": ["starsessions", "slowapi", "cashews"],
    "django": ["django_redis", "django_ratelimit"],
}


class Target(NamedTuple):
    """Holds a framework's rate with ours, `gather` and near, as a multiple of that with the usual parts."""

    ours: float
    gathered: float
    near: float


TARGETS = {
    "flask": Target(2.5, 2.5, 4.0),
    "fastapi": Target(2.7, 2.7, 5.0),
    "django": Target(1.4, 1.4, 2.0),
}
REDIS_CPU = 1.0  # of what Django's usual parts take, at most


def run(effort: Effort) -> Section:
    rounds = effort.pick(smoke=1, quick=2, usual=5, full=9)
    seconds = effort.pick(smoke=1, quick=1, usual=3, full=5)
    frameworks = effort.pick(smoke=["flask"], quick=FRAMEWORKS, usual=FRAMEWORKS, full=FRAMEWORKS)
    clear_environment()
    with ExitStack() as stack:
        apps = [
            stack.enter_context(App(framework, variant))
            for framework in frameworks
            for variant in VARIANTS
            if not why_not(framework, variant)
        ]
        figures = in_turns(apps, rounds, seconds)
    return section(figures, [why for f in frameworks for v in VARIANTS if (why := why_not(f, v))])


def why_not(framework: str, variant: str) -> str:
    """Return why this app is skipped, or nothing."""
    missing = [name for name in NEEDS[framework] if not find_spec(name)]
    if variant in USUAL and missing:
        return f"{label(framework, variant)}: skipped, without {', '.join(missing)}"
    return ""


Found = dict[tuple[str, str], list[Figures]]


def in_turns(apps: list[App], rounds: int, seconds: float) -> Found:
    for app in apps:
        app.warm_up()
    found: Found = {(app.framework, app.variant): [] for app in apps}
    for number in range(rounds):
        first = number % len(apps)
        for app in apps[first:] + apps[:first]:
            found[app.framework, app.variant].append(app.measure(seconds))
    return found


def section(found: Found, skipped: list[str]) -> Section:
    return Section(
        name="page",
        title="The same page",
        tables=[table(found), planned.table(measured(found))],
        promises=[*promises(found), *planned.promises(measured(found))],
        notes=[*notes(found), *skipped],
        charts={"page.svg": chart(found)},
        figures={
            f"{framework} {variant}": [one._asdict() for one in rounds]
            for (framework, variant), rounds in found.items()
        },
    )


def label(framework: str, variant: str) -> str:
    name = NAMES[framework]
    return {
        "bare": f"{name} alone",
        "usual": f"{name}, the usual parts",
        "batched": f"{name}, the usual parts, get_many",
        "ours": f"{name} + Stillroom",
        "gathered": f"{name} + Stillroom, gather",
        "near": f"{name} + Stillroom, near",
    }[variant]


def table(found: Found) -> Table:
    columns = ["requests/s", "× usual", "p50 ms", "p99 ms", "app CPU µs"]
    columns += ["Redis CPU µs", "commands", "bytes out"]
    lines = Table(["the page", *columns])
    for (framework, variant), rounds in found.items():
        lines.add(
            label(framework, variant),
            f"{middle(rounds, lambda one: one.rate):,.0f}",
            times(found, framework, variant),
            f"{middle(rounds, lambda one: one.p50):.1f}",
            f"{middle(rounds, lambda one: one.p99):.1f}",
            f"{middle(rounds, lambda one: one.app_us):,.0f}",
            f"{middle(rounds, lambda one: one.redis_us):,.0f}",
            f"{middle(rounds, lambda one: one.commands):.1f}",
            f"{middle(rounds, lambda one: one.bytes_out):,.0f}",
        )
    return lines


def middle(rounds: list[Figures], of: Callable[[Figures], float]) -> float:
    return median(map(of, rounds))


def times(found: Found, framework: str, variant: str) -> str:
    if (framework, "usual") not in found:
        return ""
    return f"{ratio(found, framework, variant, lambda one: one.rate).p50:.2f}"


def ratio(found: Found, framework: str, variant: str, of: Callable[[Figures], float]) -> Spread:
    """Return the cost, round by round, as a multiple of the usual parts of the same framework."""
    pairs = zip(found[framework, variant], found[framework, "usual"], strict=True)
    return Spread.of([of(one) / of(usual) for one, usual in pairs])


def promises(found: Found) -> Iterator[Promise]:
    for framework, target in TARGETS.items():
        for variant, least in zip(OURS, target, strict=True):
            if {(framework, variant), (framework, "usual")} <= found.keys():
                claim = f"{label(framework, variant)}: requests a second, × the usual parts"
                figure = ratio(found, framework, variant, lambda one: one.rate)
                yield Promise(claim, figure, least, at_most=False, by="wall time")
    for variant in OURS:
        if {("django", variant), ("django", "usual")} <= found.keys():
            claim = f"{label('django', variant)}: Redis' CPU a request, × the usual parts"
            figure = ratio(found, "django", variant, lambda one: one.redis_us)
            yield Promise(claim, figure, REDIS_CPU, by="the server's CPU")


def measured(found: Found) -> list[planned.Measured]:
    """Return what the plan is compared with."""
    return [
        planned.Measured(
            label(framework, variant),
            variant == "near",
            middle(found[framework, "bare"], lambda one: one.app_us),
            middle(rounds, lambda one: one.app_us),
            middle(rounds, lambda one: one.redis_us),
        )
        for (framework, variant), rounds in found.items()
        if variant in ("ours", "near")
    ]


def notes(found: Found) -> Iterator[str]:
    for framework in FRAMEWORKS:
        if (framework, "usual") in found:
            yield f"{NAMES[framework]}, the usual parts: {PARTS[framework]}"


def chart(found: Found) -> str:
    rows = [
        Bar(
            label(framework, variant),
            middle(rounds, lambda one: one.rate),
            "near" if variant == "near" else "ours" if variant in OURS else "",
            NAMES[framework],
        )
        for (framework, variant), rounds in found.items()
        if variant != "bare"
    ]
    title = "Requests a second: a session, a limit, five cached reads; one process"
    return bars(title, rows)
