"""A server that refuses all writes and answers all reads: it can't write its file, or has too few replicas."""

from __future__ import annotations

from collections.abc import Callable

import redis
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import until


def refuse_writes(server: EmbeddedServer) -> None:
    """Let the server's next dump fail, as on a full disk: it refuses all writes then, and answers all reads."""
    (server.directory / "dump.rdb").mkdir()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("save", "3600 1")
        client.bgsave()
        until(
            lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed dump"
        )


def want_replicas(server: EmbeddedServer) -> None:
    """Let the server refuse all writes for want of a replica."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("min-replicas-to-write", 1)


def take_writes(server: EmbeddedServer) -> None:
    """Let the server take writes again."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("save", "")
        client.config_set("min-replicas-to-write", 0)


# The server's word → what makes it refuse all writes.
REFUSALS: dict[str, Callable[[EmbeddedServer], None]] = {
    "misconf": refuse_writes,
    "noreplicas": want_replicas,
}
