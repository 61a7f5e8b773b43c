"""Measures what health costs: a check beside the INFO in it, an endpoint beside one that knows nothing.

A check asks seventy questions in one batch; what makes `/health` cheap is that one check serves everybody for two
seconds.
"""

from __future__ import annotations

from statistics import median

from bench.harness import Contestant, Hit, Results, compete, ready
from bench.raw import floors
from bench.report import Promise, Section, Table, contest_figures
from bench.stage import Effort, Stage, stage
from stillroom.web import HealthWSGI

OPERATOR = {"REQUEST_METHOD": "GET", "REMOTE_ADDR": "127.0.0.1"}
PUBLIC = OPERATOR | {"HTTP_VIA": "a proxy"}
CHECK_TIMES_INFO = 4.0  # at most
HELD_TIMES_LIVE = 2.0


def run(effort: Effort) -> Section:
    with stage() as here:
        hits = max(2, effort.hits // 6)
        results = compete(contestants(here), rounds=effort.rounds, hits=hits)
    return Section(
        name="health",
        title="Health",
        tables=[table(results)],
        promises=[
            Promise(
                "room.health.check() takes, × INFO by redis-py",
                times(results, "room.health.check()", "INFO"),
                CHECK_TIMES_INFO,
                by="CPU",
            ),
            Promise(
                "/health while held takes, × /health/live",
                times(results, "GET /health, public", "GET /health/live"),
                HELD_TIMES_LIVE,
                by="CPU",
            ),
        ],
        figures=contest_figures(results),
    )


def contestants(here: Stage) -> list[Contestant]:
    app = HealthWSGI(here.room)

    def get(path: str, environ: dict[str, str]) -> Hit:
        return lambda: app(environ | {"PATH_INFO": path}, lambda *_: None)

    return [
        floors(here.url)[0],
        Contestant("INFO", "bare", ready(here.client.info), package="redis"),
        Contestant("room.health.check()", "ours", ready(here.room.health.check)),
        Contestant("GET /health/live", "ours", ready(get("/health/live", PUBLIC))),
        Contestant("GET /health, public", "ours", ready(get("/health", PUBLIC))),
        Contestant("GET /health, details", "ours", ready(get("/health", OPERATOR))),
        Contestant("GET /metrics", "ours", ready(get("/metrics", OPERATOR))),
    ]


def times(results: Results, ours: str, other: str) -> float:
    return median(a / b for a, b in zip(results.cpu(ours), results.cpu(other), strict=True))


def table(results: Results) -> Table:
    lines = Table(["health", "CPU µs", "steps"])
    for one in results.contestants:
        cpu = median(results.cpu(one.name))
        lines.add(one.name, f"{cpu:,.0f}", f"{results.steps[one.name]:,.0f}")
    return lines
