"""Tell the error of a failed load to the callers that waited for it, in this process and in all others."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Set as AbstractSet
from typing import Any

from stillroom.errors import LoadFailed, LoadShed, StillroomError
from stillroom.oldest import oldest
from stillroom.shown import message_of
from stillroom.urls import redact
from stillroom.wire import Command

TOLD_MS = 2_000  # a waiter looks every 75 ms at the latest
KEPT_S = TOLD_MS / 1000
KEPT_LIMIT = 1_000  # errors of this process
DETAIL_LIMIT = 200  # characters of an error's message


class OfOneCall(StillroomError):
    """A load failed by something that its caller alone has: the next caller's may well not."""


class Failures:
    """The errors of this process' loads, for as long as somebody may still wait for one. By the load's lease."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[float, Exception]] = {}

    def keep(self, lease: bytes, error: Exception) -> None:
        """Remember an error for a moment."""
        self.forget()
        if len(self._kept) < KEPT_LIMIT:
            self._kept[lease] = time.monotonic() + KEPT_S, error

    def forget(self) -> list[Command]:
        """Forget the errors that nobody waits for any more. Their frames hold what the failed loads held.

        Each flush of the counts calls this too, because the next failure may be hours away.
        """
        now = time.monotonic()
        for lease, (until, _) in oldest(self._kept.items(), KEPT_LIMIT):
            if until > now:
                break
            self._kept.pop(lease, None)
        return []

    def of(
        self, told: bytes | None, waited_for: AbstractSet[bytes], loader: str
    ) -> Exception | None:
        """Return the error of a load that was waited for, if this is what Redis tells of one.

        In the process of the load it is the error itself, or its copy; elsewhere a LoadFailed or LoadShed.
        """
        lease, _, text = (told or b"").partition(b" ")
        if not lease or lease not in waited_for:
            return None
        if (kept := self._kept.get(lease)) is not None:
            return again(kept[1])
        return _from_json(text, loader)


def is_of_the_caller(error: BaseException) -> bool:
    """Return whether what ended a load is about its caller: cancelled, interrupted, or a task whose time is over.

    Celery raises the soft time limit of a task, an Exception, wherever that task is. No value stands in for it, and
    it is no other caller's. Outside of a task it is what the loader has heard of another task.
    """
    celery: Any = sys.modules.get("celery")
    limit = getattr(sys.modules.get("celery.exceptions"), "SoftTimeLimitExceeded", ())
    return not isinstance(error, Exception) or (
        isinstance(error, limit) and bool(celery.current_task)
    )


def as_json(error: Exception) -> bytes:
    """Return what other processes are told of an error: its class and its message, without passwords in URLs."""
    told: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, LoadShed):
        told |= {"at_once": error.at_once, "retry_after": error.retry_after}
    else:
        told["detail"] = redact(" ".join(message_of(error).split()))[:DETAIL_LIMIT]
    return json.dumps(told).encode()


def _from_json(text: bytes, loader: str) -> Exception:
    try:
        told = json.loads(text)
        if "retry_after" in told:
            return LoadShed(loader, int(told["at_once"]), float(told["retry_after"]))
        return LoadFailed(loader, str(told["kind"]), str(told.get("detail", "")))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return LoadFailed(loader, "an error that can't be read")


def again(error: Exception) -> Exception:
    """Copy the error for another caller, because threads that raise one object write into one traceback."""
    try:
        another = copy.copy(error)
    except Exception:  # it is made of what can't be copied
        return error
    if type(another) is not type(error):
        return error
    # A class that makes its message of its arguments has made it of the message. It may be a frozen dataclass.
    for name in ("args", "__traceback__", "__cause__", "__context__", "__suppress_context__"):
        BaseException.__setattr__(another, name, getattr(error, name))
    return another
