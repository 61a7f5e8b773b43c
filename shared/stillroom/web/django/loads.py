"""Looks after database connections around a worker's load, as Django does around each request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import close_old_connections


@contextmanager
def looked_after() -> Iterator[None]:
    """Close connections that are broken, or older than CONN_MAX_AGE, before the load and after it."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()
