"""A server that can't write its file, without a disk that is full."""

from __future__ import annotations

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
