"""Measures what a large invalidation, the reclaim behind it, and a read of a hundred keys cost.

The parts are: `invalidate_by_tag` on a tag of many entries and of ten; another client's GETs alone, beside a client
that only reads, and beside the reclaim of that tag by one thread, each in a process of its own; `get_many` of a
hundred values beside one MGET by redis-py with pydantic's validation; the memory that a tag takes per entry; and
the cost of a new process' first read when there are many marks.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from pydantic import BaseModel, TypeAdapter

from bench.harness import Contestant, compete, ready
from bench.others import doing, latencies, percentile
from bench.processes import cpus
from bench.raw import floors
from bench.report import Promise, Section, Table, contest_table
from bench.stage import Effort, Stage, stage
from stillroom import NoDispatch, Stillroom
from stillroom.cache.entry import body

READS_S = 1.5  # of another client's reads before the reclaim
LARGE_OVER_SMALL, RECLAIM_RATE, SLOWER = 1.5, 40_000, 2.0
FIRST_READ_US = 1_000

# Repeats the writes of one put.lua: a server fills itself faster than a client can.
FILL = """
local prefix, index, tag, clock = ARGV[1], ARGV[2], ARGV[3], redis.call('GET', KEYS[1])
local epoch, stamp = string.match(clock, '^(%w+)%.(%d+)$')
for n = tonumber(ARGV[4]), tonumber(ARGV[5]) do
  local name = 'k:' .. n
  local rest = string.gsub(ARGV[6], '@', name, 1)
  redis.call('SET', prefix .. name, table.concat({'1', epoch, stamp, ARGV[7], '0', rest}, '\\t'), 'PX', 3600000)
  if index ~= '' then redis.call('ZADD', index, ARGV[7], name) end
end
"""


class Product(BaseModel):
    id: int
    name: str
    price_cents: int


def run(effort: Effort) -> Section:
    entries = effort.pick(smoke=500, quick=50_000, usual=300_000, full=1_000_000)
    marks = effort.pick(smoke=300, quick=20_000, usual=60_000, full=200_000)
    with stage() as here:
        many = get_many(here, effort)
        section = Section("invalidation", "Invalidation, and what is behind it", [many])
        tag(here, entries, section)
        first_read(here, marks, section)
    return section


def get_many(here: Stage, effort: Effort) -> Table:
    """Measure a hundred values by get_many, beside one MGET and validation."""
    room, client = here.room, here.client
    products = {f"p:{n}": Product(id=n, name="Plum jam", price_cents=n) for n in range(100)}
    room.cache.set_many(products, type=Product)
    client.mset({key: value.model_dump_json() for key, value in products.items()})
    keys, adapter = list(products), TypeAdapter(Product)

    def mget() -> list[Product]:
        return [adapter.validate_json(value) for value in client.mget(keys)]

    contestants = [
        floors(here.url)[0],
        Contestant("MGET and pydantic", "bare", ready(mget), package="redis"),
        Contestant(
            "get_many(100, Product)", "ours", ready(lambda: room.cache.get_many(keys, Product))
        ),
    ]
    results = compete(contestants, rounds=effort.rounds, hits=max(2, effort.hits // 6))
    return contest_table(results, "a hundred values")


def tag(here: Stage, entries: int, section: Section) -> None:
    """Measure what it takes to kill the entries of a large tag, and to free their memory beside other clients."""
    room, client = here.room, here.client
    plain = fill(here, entries, "")
    with_tag = fill(here, entries, "large")
    bytes_each = (with_tag - plain) / entries
    section.notes.append(f"{bytes_each:.0f} bytes per entry and tag beyond the entry itself")
    room.cache.set_many({f"s:{n}": n for n in range(10)}, tags=["small"])
    large, small = invalidate_in_turns(room, "large", "small")
    table = Table(["invalidate_by_tag", "µs"])
    table.add(f"{entries:,} entries", f"{large:.0f}")
    table.add("10 entries", f"{small:.0f}")
    client.set("probe", "x" * 100)
    quiet = latencies(client, lambda waited: waited > READS_S)
    busy, _ = beside(here, "gets", READS_S)
    during, report = beside(here, "reclaim")
    rate = report["deleted"] / report["seconds"]
    others = Table(["another client's GET", "p50 µs", "p99 µs"])
    for name, taken in (("alone", quiet), ("beside a reader", busy), ("beside a reclaim", during)):
        others.add(name, f"{median(taken) * 1e6:.0f}", f"{percentile(taken) * 1e6:.0f}")
    slower = percentile(during) / percentile(busy)
    section.tables += [table, others]
    section.promises += [
        Promise(
            "a large tag is invalidated, × a small one",
            large / small,
            LARGE_OVER_SMALL,
            by="wall time",
        ),
        Promise("entries reclaimed a second", rate, RECLAIM_RATE, at_most=False, by="wall time"),
        Promise("GET's p99 beside a reclaim, × beside a reader", slower, SLOWER, by="wall time"),
    ]


def beside(here: Stage, what: str, *arguments: object) -> tuple[list[float], Any]:
    """Return (the latencies while another process does this, its report)."""
    with doing(what, here.url, *arguments, cpu=cpus()[0]) as other:
        times = latencies(here.client, lambda _: other.is_done)
        return times, other.report()


def invalidate_in_turns(room: Stillroom, *tags: str) -> list[float]:
    """Return the median µs of an invalidation, for each tag."""
    times: dict[str, list[float]] = {one: [] for one in tags}
    for _ in range(200):
        for one, taken in times.items():
            began = time.perf_counter()
            room.cache.invalidate_by_tag(one)
            taken.append(time.perf_counter() - began)
    return [median(taken) * 1e6 for taken in times.values()]


def first_read(here: Stage, marks: int, section: Section) -> None:
    """Measure the first read of a new process, whose commands make all other clients wait."""
    room, client = here.room, here.client
    client.flushall()
    room.cache.set("k", 1, tags=["t"])
    for start in range(0, marks, 100):
        room.cache.invalidate_by_tag(*[f"m:{n}" for n in range(start, start + 100)])
    client.config_set("slowlog-log-slower-than", 0)
    took, longest = [], []
    for _ in range(5):
        with Stillroom(here.settings, dispatch=NoDispatch()) as new:
            client.slowlog_reset()
            began = time.thread_time()
            new.cache.get("k")
            took.append(time.thread_time() - began)
            longest.append(max(one["duration"] for one in client.slowlog_get(50)))
    client.config_set("slowlog-log-slower-than", -1)
    table = Table([f"the first read of a process, {marks:,} marks", "CPU ms", "longest command µs"])
    table.add("cache.get", f"{median(took) * 1e3:.1f}", f"{median(longest):.0f}")
    section.tables.append(table)
    claim = "longest command of a new process' first read, µs"
    section.promises.append(Promise(claim, median(longest), FIRST_READ_US, by="slow log"))


# --- what it is done to ---------------------------------------------------------------------------


def fill(here: Stage, entries: int, tag: str) -> int:
    """Fill the server with so many entries, and return its used_memory."""
    room, client = here.room, here.client
    client.flushall()
    room.cache.invalidate_by_tag("begin")
    room.cache.reclaim()  # a first epoch asks for a sweep; it is not what is measured
    payload = b'{"id":7,"name":"Plum jam","price_cents":350}'
    tags = [tag.encode()] if tag else []
    rest = body(b"j", b"", b"@", tags, payload).partition(b"\t")[2]
    index = room.keys.index(tag.encode()) if tag else b""
    expires = str(int((time.time() + 3600) * 1000))
    script = client.register_script(FILL)
    for start in range(0, entries, 5_000):
        last = min(start + 5_000, entries) - 1
        args = [room.keys.entry_prefix, index, tag, start, last, rest, expires]
        script(keys=[room.keys.clock], args=args)
    return int(client.info("memory")["used_memory"])
