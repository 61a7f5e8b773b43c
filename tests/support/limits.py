"""Read the logs of limits and move their time by hand."""

from __future__ import annotations

from typing import Any

from tests.support.abuse import texts_in

ENTRY = 7  # bytes of a time; the count has 4


def read_log(client: Any, key: bytes) -> list[tuple[int, int]]:
    """Return (last µs, count) of each entry."""
    raw = client.get(key) or b""
    size = ENTRY + 4
    parts = [raw[n : n + size] for n in range(0, len(raw), size)]
    return [(int.from_bytes(p[:ENTRY], "big"), int.from_bytes(p[ENTRY:], "big")) for p in parts]


def packed(log: list[tuple[int, int]]) -> bytes:
    return b"".join(at.to_bytes(ENTRY, "big") + n.to_bytes(4, "big") for at, n in log)


def write_log(client: Any, key: bytes, log: list[tuple[int, int]]) -> None:
    client.set(key, packed(log), keepttl=True)


def logs(client: Any) -> list[bytes]:
    return [key for key in client.keys("*{rl:*") if b"!" not in key]


def age_us(client: Any, us: int) -> None:
    """Make all hits this much older; below 0 means that the server's clock has stepped back."""
    for key in logs(client):
        write_log(client, key, [(at - us, n) for at, n in read_log(client, key)])


def age(client: Any, seconds: float) -> None:
    age_us(client, round(seconds * 1e6))


def forget_denials(room: Any) -> None:
    """Forget the denials, as another process that does not know them."""
    getattr(room, "inner", room)._limits_body._denials.reset()


def expire_denials(room: Any) -> None:
    """Let the remembered denials expire, so that they may be asked for again."""
    for denial in getattr(room, "inner", room)._limits_body._denials.found.values():
        denial.until = 0.0


def events(client: Any, room: Any) -> list[dict[str, str]]:
    """Return the stream's events as text."""
    return texts_in(client, room.keys.abuse)
