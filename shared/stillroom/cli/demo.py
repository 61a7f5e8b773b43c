"""`stillroom demo`: the example shop with real workers, and its story told over HTTP with real timings.

It ends by itself, with exit code 1 if a step did not happen; `--serve` keeps the shop open instead.
"""

from __future__ import annotations

import importlib.util
import io
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stillroom.cli.recorder import Recorder
from stillroom.cli.stack import redis_url, services
from stillroom.cli.story import Story
from stillroom.cli.supervisor import Service, Supervisor
from stillroom.embedded import free_port
from stillroom.errors import StillroomError
from stillroom.settings import Settings, redact

FRESH = "1"  # seconds a page is fresh in the story …
FRESH_SERVED = "10"  # … and for somebody who looks at it; a real shop would say minutes
QUERY_MS = "100"  # what a query of the shop takes

console = Console(highlight=False, soft_wrap=True)


class DemoUnavailable(StillroomError):
    """The example shop can't be served here."""


def demo(
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep the shop open until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(help="Where the shop listens with --serve.")] = 8000,
    flower_port: Annotated[int, typer.Option(help="And Flower; 0: no Flower.")] = 5555,
) -> None:
    """Serve the example shop with a worker, and tell its story: a miss, hits, a stale page, an edit."""
    examples = find_examples()
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder, redis_url() as (url, embedded):
        kind = "an embedded server" if embedded else "REDIS_URL"
        console.print(f"[bold]Stillroom demo[/bold] on {redact(url)} ({kind})")
        environment = environment_of_shop(url, Path(folder), examples)
        Settings(redis_url=url)  # a mistake is told before anything is started
        if serve:
            raise typer.Exit(_serve(environment, port, flower_port))
        raise typer.Exit(_tell(environment))


def _serve(environment: Mapping[str, str], port: int, flower_port: int) -> int:
    environment = {**environment, "STILLROOM_TTL": FRESH_SERVED}
    wanted = services(environment, flower_port=flower_port or None)
    console.print(f"the shop is http://127.0.0.1:{port}, its health http://127.0.0.1:{port}/status")
    if any(service.name == "flower" for service in wanted):
        flower = f"http://127.0.0.1:{flower_port}"
        environment["STILLROOM_FLOWER_URL"] = flower  # for the link on /status
        console.print(f"Flower is {flower}")
    return Supervisor([*wanted, shop_service(environment, port)]).run()


def _tell(environment: Mapping[str, str]) -> int:
    with _stage(environment) as story:
        happened = story.tell()
    console.print(f"\n{happened} of {len(story.steps)} steps happened as told.")
    return 0 if happened == len(story.steps) else 1


@contextmanager
def _stage(environment: Mapping[str, str]) -> Iterator[Story]:
    """The shop in two processes, a worker, and somebody who listens to what Redis is told."""
    port, log = free_port(), io.StringIO()
    worker, *_ = services(environment, flower_port=None)
    with Recorder(environment["REDIS_URL"]) as recorder:
        with Supervisor([worker, shop_service(environment, port)], out=log):
            yield Story(port, Path(environment["SHOP_DATABASE"]), recorder, log, console)


def shop_service(environment: Mapping[str, str], port: int, app: str = "shop.app:app") -> Service:
    """The shop, in two processes."""
    gunicorn = ["gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", "--threads", "8"]
    quietly = ["--no-control-socket", "--log-level", "warning"]
    command = [sys.executable, "-m", *gunicorn, *quietly, app]
    return Service("shop", command, environment)


def environment_of_shop(url: str, folder: Path, examples: Path) -> dict[str, str]:
    """What the shop and its worker are told; `folder` takes the database."""
    return {
        "REDIS_URL": url,
        "PYTHONPATH": os.pathsep.join(
            [str(examples), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "STILLROOM_NAMESPACE": f"demo-{os.getpid()}",  # beside whatever else lives on that server
        "STILLROOM_LOADERS": "shop.cache",
        "STILLROOM_TTL": FRESH,
        "STILLROOM_SESSION_PEPPERS": secrets.token_urlsafe(32),  # the shop's processes share them
        "SHOP_DATABASE": str(folder / "shop.db"),
        "SHOP_QUERY_MS": QUERY_MS,
    }


def find_examples() -> Path:
    """The folder `examples` of a checkout: this one's, or the current one. Raises DemoUnavailable."""
    checkouts = [Path(__file__).parents[3], Path.cwd()]
    found = [root / "examples" for root in checkouts if (root / "examples/shop/app.py").is_file()]
    if not found:
        raise DemoUnavailable(
            "the demo serves examples/shop, which is in Stillroom's source, not in its wheel: run it in a checkout"
        )
    missing = [name for name in ("flask", "gunicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise DemoUnavailable(
            f'the shop needs {" and ".join(missing)}: pip install "stillroom[example]"'
        )
    return found[0]
