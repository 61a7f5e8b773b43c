"""Measures what a cache hit costs beyond the raw round trip, in Stillroom and in other libraries."""

from __future__ import annotations

from collections.abc import Iterator

from bench.chart import Bar, bars
from bench.contestants import BODY, contestants
from bench.harness import Kind, Results, Spread, compete
from bench.report import Promise, Section, contest_figures, contest_notes, contest_table
from bench.stage import Effort, stage

OURS_OVER_BARE = 0.5  # at most
PEER_OVER_OURS = 2.0  # at least
KINDS: tuple[Kind, Kind] = ("sync", "async")


def run(effort: Effort) -> Section:
    with stage() as here:
        results = compete(contestants(here.url), rounds=effort.rounds, hits=4 * effort.hits)
    return Section(
        name="hits",
        title=f"A cache hit of {len(BODY)} bytes",
        tables=[contest_table(results, "a hit")],
        promises=[promise for kind in KINDS for promise in promises(results, kind)],
        notes=contest_notes(results),
        charts={"hits.svg": chart(results)},
        figures=contest_figures(results),
    )


def promises(results: Results, kind: Kind) -> Iterator[Promise]:
    """Yield the promises beside redis-py, and beside the cheapest of the others."""
    ours = results.find(kind, "ours")[0].name
    claim = f"{ours}: a hit adds, × what redis-py's GET adds"
    yield Promise(claim, results.ratio(ours, results.bare(ours)), OURS_OVER_BARE)
    if peer := results.cheapest_peer(kind):
        claim = f"{peer}, the cheapest other, adds, × {ours}"
        yield Promise(claim, results.ratio(peer, ours), PEER_OVER_OURS, at_most=False)


def chart(results: Results) -> str:
    rows = [
        Bar(
            one.name,
            Spread.of(results.added(one.name)).p50,
            "ours" if one.role == "ours" else "",
            "blocking" if one.kind == "sync" else "awaited",
        )
        for one in results.contestants
        if one.role != "floor"
    ]
    return bars("CPU that a cache hit adds to the raw round trip, µs", rows)
