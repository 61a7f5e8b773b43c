"""Defines what the demo runs: the shop in two processes, a worker, and their environment."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from stillroom.cli.supervisor import Service

EXAMPLES = Path(__file__).parents[2]
FRESH = "1"  # seconds a page is fresh in the story …
QUERY_MS = "100"  # what a query of the shop takes
# By the usual deadlines a machine that is busy for a moment is an outage of Redis, and that is another story.
PATIENCE = {
    "STILLROOM_CONNECT_TIMEOUT": "5",
    "STILLROOM_COMMAND_TIMEOUT": "5",
    "STILLROOM_CALL_TIMEOUT": "10",
    "STILLROOM_REQUEST_TIMEOUT": "10",
    "STILLROOM_POOL_TIMEOUT": "5",
}


def shop_service(environment: Mapping[str, str], port: int, app: str = "shop.app:app") -> Service:
    """Return the shop's service, which runs in two processes."""
    gunicorn = ["gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", "--threads", "8"]
    quietly = ["--no-control-socket", "--log-level", "warning"]
    command = [sys.executable, "-m", *gunicorn, *quietly, app]
    return Service("shop", command, environment)


def environment_of_shop(url: str, folder: Path) -> dict[str, str]:
    """Return the environment of the shop and its worker. `folder` takes the database."""
    return {
        "REDIS_URL": url,
        "PYTHONPATH": os.pathsep.join(
            [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "STILLROOM_NAMESPACE": f"demo-{os.getpid()}",  # beside whatever else lives on that server
        "STILLROOM_LOADERS": "shop.cache",
        "STILLROOM_TTL": FRESH,
        "STILLROOM_SESSION_PEPPERS": secrets.token_urlsafe(32),  # the shop's processes share them
        "SHOP_DATABASE": str(folder / "shop.db"),
        "SHOP_QUERY_MS": QUERY_MS,
    }
