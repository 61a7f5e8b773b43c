"""What do a large invalidation, and the reclaim behind it, cost; and what a read of a hundred keys?

    python tests/bench/invalidation.py [--entries 1000000]

Side by side, in one run, on an embedded server: `invalidate_by_tag` on a tag of a million entries and of ten;
another client's GETs alone, beside a client that only reads, and beside the reclaim of that million by one thread,
each in a process of its own; `get_many` of a hundred values beside one MGET of the same by redis-py with pydantic's
validation. And the memory that a tag takes per entry.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, TypeAdapter

import redis

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests.support

from harness import Table

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.cache.entry import body
from stillroom.embedded import EmbeddedServer

PATIENT: dict[str, Any] = {"command_timeout": 5.0, "call_timeout": 10.0}
CALLS = 200
GETS_S = 4.0  # of another client's reads before the reclaim

# What one put.lua writes, many times over: a server fills itself faster than a client can.
FILL = """
local prefix, index, tag, clock = ARGV[1], ARGV[2], ARGV[3], redis.call('GET', KEYS[1])
local epoch, stamp = string.match(clock, '^(%w+)%.(%d+)$')
for n = tonumber(ARGV[4]), tonumber(ARGV[5]) do
  local name = 'k:' .. n
  local rest = string.gsub(ARGV[6], '@', name, 1)
  redis.call('SET', prefix .. name, table.concat({'1', epoch, stamp, ARGV[7], '0', rest}, '\t'), 'PX', 3600000)
  if index ~= '' then redis.call('ZADD', index, ARGV[7], name) end
end
"""


class Product(BaseModel):
    id: int
    name: str
    price_cents: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--reclaim", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--read", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reclaim:
        return reclaim(options.reclaim)
    if options.read:
        return read(options.read)
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        with Stillroom(Settings(redis_url=server.url, **PATIENT), dispatch=NoDispatch()) as room:
            print(many(room, client))
            tagged(room, client, options.entries)
    return None


def many(room: Stillroom, client: Any) -> str:
    """get_many(100) beside one MGET and validation, interleaved."""
    products = {f"p:{n}": Product(id=n, name="Plum jam", price_cents=n) for n in range(100)}
    room.cache.set_many(products, type=Product)
    client.mset({key: value.model_dump_json() for key, value in products.items()})
    keys, adapter = list(products), TypeAdapter(Product)
    ways: dict[str, Callable[[], Any]] = {
        "get_many(100, Product)": lambda: room.cache.get_many(keys, Product),
        "redis-py MGET + pydantic": lambda: [
            adapter.validate_json(value) for value in client.mget(keys)
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    room.stats.due = 1 << 62
    for _ in range(CALLS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    floor = median(times["redis-py MGET + pydantic"])
    table = Table("a hundred values", "µs", "ratio")
    for name, taken in times.items():
        table.add(name, f"{median(taken) * 1e6:.0f}", f"{median(taken) / floor:.2f}")
    return str(table)


def tagged(room: Stillroom, client: Any, entries: int) -> None:
    plain = fill(room, client, entries, "")
    with_tag = fill(room, client, entries, "large")
    print(
        f"\nmemory: {(with_tag - plain) / entries:.0f} bytes per entry and tag beyond the entry itself"
    )
    room.cache.set_many({f"s:{n}": n for n in range(10)}, tags=["small"])
    times: dict[str, list[float]] = {"large": [], "small": []}
    for _ in range(CALLS):
        for tag, taken in times.items():
            began = time.perf_counter()
            room.cache.invalidate_by_tag(tag)
            taken.append(time.perf_counter() - began)
    large, small = median(times["large"]), median(times["small"])
    print(
        f"invalidate_by_tag: {entries:,} entries {large * 1e6:.0f} µs, ten {small * 1e6:.0f} µs",
        end="",
    )
    print(f", ratio {large / small:.2f}")
    client.set("probe", "x" * 100)
    quiet = latencies(client, lambda waited: waited > GETS_S)
    busy, _ = beside("--read", room, client)
    during, report = beside("--reclaim", room, client)
    rate = report["deleted"] / report["seconds"]
    seconds = f"{report['seconds']:.1f} s"
    print(f"reclaim: {report['deleted']:,} entries in {seconds}, {rate:,.0f} a second")
    table = Table(
        "another client's GET", "p50 µs", "p99 µs", "p99 × alone", "p99 × beside a reader"
    )
    for name, taken in (("alone", quiet), ("beside a reader", busy), ("beside a reclaim", during)):
        p50, p99 = median(taken) * 1e6, percentile(taken) * 1e6
        ratios = [f"{percentile(taken) / percentile(other):.2f}" for other in (quiet, busy)]
        table.add(name, f"{p50:.0f}", f"{p99:.0f}", *ratios)
    print(f"\n{table}")


def beside(what: str, room: Stillroom, client: Any) -> tuple[list[float], Any]:
    """→ (latencies while another process does this, what it reports)."""
    command = [sys.executable, __file__, what, room.settings.redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        times = latencies(client, lambda _: other.poll() is not None)
        return times, json.loads(other.stdout.read())


def fill(room: Stillroom, client: Any, entries: int, tag: str) -> int:
    """→ used_memory with so many entries."""
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
        args = [
            room.keys.entry_prefix,
            index,
            tag,
            start,
            min(start + 5_000, entries) - 1,
            rest,
            expires,
        ]
        script(keys=[room.keys.clock], args=args)
    return int(client.info("memory")["used_memory"])


def latencies(client: Any, enough: Callable[[float], bool]) -> list[float]:
    """Seconds of one GET after the other."""
    times: list[float] = []
    started = time.perf_counter()
    while not enough(time.perf_counter() - started):
        for _ in range(50):
            began = time.perf_counter()
            client.get("probe")
            times.append(time.perf_counter() - began)
    return times


def percentile(times: list[float], share: float = 0.99) -> float:
    return sorted(times)[int(len(times) * share)]


def reclaim(url: str) -> None:
    """What a worker's thread does, in a process of its own."""
    with Stillroom(Settings(redis_url=url), dispatch=NoDispatch()) as room:
        print("ready", flush=True)
        began = time.perf_counter()
        report = {"deleted": 0}
        while (done := room.cache.reclaim(budget=600))["done"]:
            report["deleted"] += done["deleted"]
        print(json.dumps(report | {"seconds": time.perf_counter() - began}))


def read(url: str) -> None:
    """Another app's process: one GET after the other."""
    with redis.Redis.from_url(url) as client:
        print("ready", flush=True)
        print(json.dumps(len(latencies(client, lambda waited: waited > GETS_S))))


if __name__ == "__main__":
    main()
