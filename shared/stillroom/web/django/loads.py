"""Looks after database connections around a worker's load, as Django does around each request."""

from __future__ import annotations

from django.db import close_old_connections


class looked_after:  # noqa: N801  # named as contextlib's are
    """Close connections that are broken, or older than CONN_MAX_AGE, before the load and after it.

    This is no generator: contextlib assigns to an error that it lets pass, which a frozen dataclass refuses.
    """

    def __enter__(self) -> None:
        close_old_connections()

    def __exit__(self, *_: object) -> None:
        close_old_connections()
