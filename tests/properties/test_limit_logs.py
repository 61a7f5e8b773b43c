"""limit_check leaves a log packed: it keeps packed entries and packs only changed ones."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stillroom import Stillroom
from stillroom.scripts import limit_check

Log = list[tuple[int, int]]  # (last µs, hits), oldest first

KEY = b"stillroom:{rl:ip:203.0.113.7}:any"
SLICES = 24


def packed(log: Log) -> bytes:
    return b"".join(at.to_bytes(7) + hits.to_bytes(4) for at, hits in log)


def unpacked(raw: bytes) -> Log:
    return [
        (int.from_bytes(raw[i : i + 7]), *struct.unpack(">I", raw[i + 7 : i + 11]))
        for i in range(0, len(raw), 11)
    ]


def taken(log: Log, now: int, window: int, keep: int, quota: int, cost: int) -> Log:
    """Return the log after a hit, as lua/lib/hits.lua documents it."""
    is_ahead = bool(log) and log[-1][0] > now
    log = [(min(at, now), hits) for at, hits in log]
    kept = [(at, hits) for at, hits in log if at > now - keep]
    used = sum(hits for at, hits in kept if at > now - window)
    if used + cost > quota:
        return log if is_ahead else []
    last = kept[-1] if kept else (0, 0)
    slice_us = window / SLICES
    is_shared = last[0] > now - window and last[0] // slice_us == now // slice_us
    if quota > SLICES and is_shared:
        return [*kept[:-1], (now, last[1] + cost)]
    return [*kept, (now, cost)]


def check(client: Any, window: int, keep: int, quota: int, cost: int) -> Sequence[int]:
    """Return the script's reply to one hit."""
    keys = (b"stillroom:abuse", b"stillroom:{rl:!widths}", KEY)
    about = ("take", cost, 0, 1, "", "", 1, "", "")
    numbers = (quota, window, keep // 1_000 + 1_000)
    words = (*keys, *about, *numbers, "ip", "203.0.113.7")
    reply: Sequence[int] = client.eval(limit_check.plain.source, len(keys), *words)
    return reply


@pytest.mark.parametrize("seed", range(60))
def test_a_log_after_a_hit_is_what_the_model_says(
    make_room: Callable[..., Stillroom], client: Any, seed: int
) -> None:
    """A log after a hit is the model's, with expired hits, two windows, shared slices and a clock that
    stepped back.
    """
    chance = random.Random(seed)
    for _ in range(15):
        window = chance.choice([1, 60, 300, 3_600]) * 1_000_000
        keep = window * chance.choice([1, 1, 2, 10])
        quota, cost = chance.choice([3, 24, 25, 1_000]), chance.choice([1, 1, 5])
        seconds, micros = client.time()
        now = seconds * 1_000_000 + micros
        ages = sorted(
            {
                chance.randrange(-window // 8, 12 * window)
                for _ in range(chance.choice([0, 1, 2, 9, 23]))
            }
        )
        before: Log = [(now - age, chance.randint(1, 3)) for age in reversed(ages)]
        client.delete(KEY)
        if before:
            client.set(KEY, packed(before), px=100_000_000)
        reply = check(client, window, keep, quota, cost)
        expected = taken(before, reply[1], window, keep, quota, cost)
        if reply[0] == 1 or expected:
            assert unpacked(client.get(KEY)) == expected
            assert 0 < client.pttl(KEY) <= keep // 1_000 + 1_000
        else:
            assert unpacked(client.get(KEY) or b"") == before
