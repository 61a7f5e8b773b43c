"""Tells which files can be read, also under eventlet, which takes `select.poll` out of Python."""

from __future__ import annotations

import select
from collections.abc import Callable
from functools import partial
from typing import Any

Ready = list[tuple[int, int]]  # descriptors, each with what has happened to it


def watch(*files: Any) -> Callable[[float], Ready]:
    """Return a function that waits until one of the files can be read, for so many milliseconds at most."""
    if not hasattr(select, "poll"):
        return partial(_select, [_descriptor(file) for file in files])
    poll = select.poll()  # not select(), which knows only the first 1,024 descriptors of a process
    for file in files:
        poll.register(file, select.POLLIN)
    return poll.poll


def _select(descriptors: list[int], milliseconds: float) -> Ready:
    try:
        ready = select.select(descriptors, (), (), milliseconds / 1000)[0]
    except OSError:  # one of them has been closed: to poll() it is ready
        ready = descriptors
    return [(descriptor, select.POLLIN) for descriptor in ready]


def _descriptor(file: Any) -> int:
    return file if isinstance(file, int) else int(file.fileno())
