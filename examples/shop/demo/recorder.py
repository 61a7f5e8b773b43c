"""Records, by MONITOR, the commands that a server gets in each step of a story."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import Self

import redis
from stillroom.scripts import BY_SHA

# A connection's first words, what counts and clocks are kept by, and what Celery says to its broker.
QUIET = {"HELLO", "CLIENT", "AUTH", "SELECT", "PING", "TIME", "ECHO", "HINCRBY", "EXPIRE", "SCRIPT"}
OURS = re.compile(r":\{(0|s[0-9a-f]{2}|rl:[^}]*)\}:|:(abuse|agreed|orders)$")


class Recorder:
    """Collects the cache's commands between two calls of `commands()`."""

    def __init__(self, url: str) -> None:
        # redis-py gives up after 5 s of silence, which there may well be while programs start.
        self._client = redis.Redis.from_url(url, socket_timeout=None)
        self._monitor = self._client.monitor()  # type: ignore[no-untyped-call]
        self._seen: list[str] = []
        self._step = 0
        self._passed: dict[str, threading.Event] = {}

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        threading.Thread(target=self._listen, name="recorder", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.commands()
        self._client.close()

    def commands(self) -> list[str]:
        """Return the commands since the last call, each once, with how often it was sent."""
        self._step += 1
        mark = f"step-{self._step}"
        passed = self._passed[mark] = threading.Event()
        self._client.echo(mark)
        passed.wait(5)
        seen, self._seen = self._seen, []
        return [
            f"{count} x {command}" if count > 1 else command
            for command, count in Counter(seen).items()
        ]

    def _listen(self) -> None:
        try:
            for event in self._monitor.listen():
                self._take(event["command"].split(" "), event["client_type"])
        except (redis.RedisError, ValueError, OSError):
            return  # the server, or the story, has ended

    def _take(self, words: list[str], client: str) -> None:
        if words[0] == "ECHO" and words[1] in self._passed:
            self._passed[words[1]].set()
        elif client != "lua" and words[0] not in QUIET and any(map(OURS.search, words)):
            self._seen.append(_readable(words))


def _readable(words: list[str]) -> str:
    """Return a script by its name and its keys, and other commands as they are."""
    text = BY_SHA.get(words[1].encode()) if words[0] == "EVALSHA" else None
    if text is None:
        return " ".join(words)
    keys = words[3 : 3 + int(words[2])]
    return f"EVALSHA {text.script.name} {' '.join(keys)}"
