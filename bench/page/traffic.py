"""Sends requests to one page over connections that stay open: by wrk if it is installed, else by a client here."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

CONNECTIONS = 12


class Load(NamedTuple):
    """Holds what the clients saw. Latencies are in ms."""

    requests: int
    seconds: float
    p50: float
    p99: float
    errors: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def send(port: int, cookie: str, seconds: float) -> Load:
    """Send as many requests as `CONNECTIONS` clients can make in this time."""
    if wrk := shutil.which("wrk"):
        words = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "--latency"]
        words += ["-H", f"Cookie: {cookie}", f"http://127.0.0.1:{port}/"]
        return _of_wrk(_run(words))
    words = [sys.executable, "-m", "bench.page.traffic", str(port), cookie, str(seconds)]
    return Load(*json.loads(_run(words)))


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout


def _of_wrk(text: str) -> Load:
    """Read what wrk prints.

    >>> _of_wrk('''
    ...   Latency Distribution
    ...      50%    3.02ms
    ...      75%    4.00ms
    ...      99%    1.01s
    ...   2512 requests in 2.01s, 0.93MB read
    ...   Non-2xx or 3xx responses: 7
    ... ''')
    Load(requests=2512, seconds=2.01, p50=3.02, p99=1010.0, errors=7)
    """
    [(requests, seconds)] = re.findall(r"(\d+) requests in ([\d.]+)s", text)
    shares = dict(re.findall(r"(50|99)%\s+([\d.]+[a-z]+)", text))
    failed = re.findall(r"Non-2xx or 3xx responses: (\d+)", text)
    failed += re.findall(r"(?:connect|read|write|timeout) (\d+)", text)
    errors = sum(map(int, failed))
    return Load(int(requests), float(seconds), _ms(shares["50"]), _ms(shares["99"]), errors)


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", text).groups()  # type: ignore[union-attr]
    return round(float(number) * {"us": 0.001, "ms": 1.0, "s": 1_000.0}[unit], 3)


# --- the small client -----------------------------------------------------------------------------


async def client(port: int, cookie: str, seconds: float) -> Load:
    request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n\r\n".encode()
    until = time.perf_counter() + seconds
    taken: list[float] = []
    errors = 0

    async def one() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < until:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if length := re.search(rb"(?i)content-length: (\d+)", head):
                await reader.readexactly(int(length[1]))
            else:
                await reader.readuntil(b"\r\n0\r\n\r\n")  # the last of its chunks
            taken.append(time.perf_counter() - began)
            errors += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    taken.sort()
    p50, p99 = (1_000 * taken[int(len(taken) * share)] for share in (0.5, 0.99))
    return Load(len(taken), time.perf_counter() - began, p50, p99, errors)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(client(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))))
