"""Keeps what a worker can't do as a dead letter, where a person finds it and can send it again.

That is a message that no task can be made of, a message that asks for more than its task, or an order whose
fields do not fit. The body of the letter is the JSON of stillroom/dead_messages.py.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kombu.utils.json import dumps

from stillroom import RedisUnavailable
from stillroom.agreed import this_process
from stillroom.dead_messages import KIND
from stillroom.dispatch import REFRESH_MANY_TASK, REFRESH_TASK
from stillroom.shown import shown
from stillroom_workers.hygiene import REASON_LENGTH

log = logging.getLogger("stillroom.workers")

# A lost refresh does no harm: the next stale read asks again. One letter of a kind a minute is enough to look at.
REFRESHES = frozenset((REFRESH_TASK, REFRESH_MANY_TASK))
SAME_AGAIN_S = 60.0
KINDS_REMEMBERED = 200


class Letters:
    """Keeps dead letters for one worker."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        # Task and reason → when it was kept, time.monotonic().
        self._kept: dict[tuple[str, str], float] = {}

    def bury(self, raw: bytes, queue: str, reason: str) -> None:
        """Keep a message that can't be run. `raw` is what lay in the queue. One ERROR line says so.

        A server that is away or refuses is logged, and the message is lost: raised, it would end the worker.
        """
        why = shown(reason, REASON_LENGTH)
        log.error("A message of %d bytes in the queue %r is no task: %s", len(raw), queue, why)
        self._keep(readable(raw, queue), why)

    def refuse(
        self, task: str, args: Sequence[Any], fields: Mapping[str, Any], reason: str
    ) -> None:
        """Keep an order whose fields do not fit, or whose loader this worker has not. Another one may have it."""
        why = shown(reason, REASON_LENGTH)
        self._app.room.state_stats.counts["orders_refused"] += 1
        if task not in REFRESHES or self._is_new(task, why):
            queue = self._app.queue_of(task)
            body = {"task": task, "queue": queue, "args": args, "kwargs": fields}
            self._keep(body, f"{why} (refused by {this_process()})")

    def _keep(self, body: Mapping[str, Any], reason: str) -> None:
        room = vars(self._app).get("room")  # Flower has none, and reads replies of workers
        try:
            if room is not None:
                room.state.run(room.dead_letters.add(KIND, dumps(body), reason))
        except RedisUnavailable as error:
            log.error("No dead letter could be written, the message is lost: %s", error)

    def _is_new(self, task: str, reason: str) -> bool:
        with self._lock:
            now = time.monotonic()
            if now - self._kept.get((task, reason), -SAME_AGAIN_S) < SAME_AGAIN_S:
                return False
            if len(self._kept) >= KINDS_REMEMBERED:
                self._kept.clear()
            self._kept[task, reason] = now
            return True


def readable(raw: bytes, queue: str) -> dict[str, Any]:
    """Return the message as a person reads it and as it can be sent again; `raw` where no task is in it."""
    try:
        found = _task_in(json.loads(raw))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        found = None
    if found is None:
        return {"queue": queue, "raw": raw.decode(errors="backslashreplace")}
    task, args, kwargs = found
    return {"task": task, "queue": queue, "args": args, "kwargs": kwargs}


def _task_in(message: Any) -> tuple[str, list[Any], dict[str, Any]] | None:
    """Return the task in a message of either protocol. A compressed body stays so, because it may be large."""
    headers, body = message["headers"], message["body"]
    if headers.get("compression"):
        return None
    if message["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    match headers.get("task"), json.loads(body):
        case str(task), [[*args], dict(kwargs), *_]:
            return task, args, kwargs
        case _, {"task": str(task), **fields}:
            old_args, old_kwargs = fields.get("args") or [], fields.get("kwargs") or {}
            if isinstance(old_args, list) and isinstance(old_kwargs, dict):
                return task, old_args, old_kwargs
    return None
