"""`make demo`: the example shop with real workers, and its story told over HTTP with real timings.

It ends by itself, with exit code 1 if a step did not happen; `--serve` keeps the shop open instead.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shop.demo.recorder import Recorder
from shop.demo.stage import PATIENCE, environment_of_shop, shop_service
from shop.demo.story import Story
from stillroom.cli.stack import redis_url, services
from stillroom.cli.supervisor import Supervisor
from stillroom.embedded import free_port
from stillroom.errors import StillroomError
from stillroom.settings import Settings
from stillroom.urls import redact

# Seconds a page is fresh for somebody who looks at it; a real shop would say minutes.
FRESH_SERVED = "10"

console = Console(highlight=False, soft_wrap=True)

BEGIN = """
A web shop runs in two processes. Its pages show values from a slow database. Stillroom keeps these values in Redis,
a server in memory that both processes share. Each value has a time of its own:

  [green]fresh: 1 second[/green]            [yellow]stale: up to an hour[/yellow]               [dim]gone[/dim]
  [green]├───────────────────┤[/green][yellow]├─────────────────────────────┤[/yellow][dim]├──────────────▸[/dim]
  shown at once         shown at once, and a worker    the next visitor
                        asks the database meanwhile    waits for the database

Four steps. Each prints the line of the shop's code that does it."""

NEXT = """
What next:
  make demo ARGS=--serve     open the shop in your browser, with Flower for the worker's tasks and /status
  make demo ARGS=-v          the same story with every command that Redis was sent
  examples/shop/cache.py     how the shop's values are made, and what makes them old
  docs/tutorial.md           build such a page yourself in 15 minutes"""


def demo(
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep the shop open until Ctrl-C.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the commands that Redis was sent.")
    ] = False,
    port: Annotated[int, typer.Option(help="Where the shop listens with --serve.")] = 8000,
    flower_port: Annotated[int, typer.Option(help="And Flower; 0: no Flower.")] = 5555,
) -> None:
    """Serve the example shop with a worker, and tell its story: a miss, hits, a stale page, an edit."""
    missing = [name for name in ("flask", "gunicorn") if not importlib.util.find_spec(name)]
    if missing:
        console.print(f"the shop needs {' and '.join(missing)}: pip install 'stillroom\\[example]'")
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder, redis_url() as (url, embedded):
        kind = "an embedded server" if embedded else "REDIS_URL"
        console.print(f"[bold]Stillroom demo[/bold] on {redact(url)} ({kind})")
        environment = environment_of_shop(url, Path(folder))
        Settings(redis_url=url)  # a mistake is told before anything is started
        if serve:
            raise typer.Exit(_serve(environment, port, flower_port))
        raise typer.Exit(_tell(environment | PATIENCE, verbose=verbose))


def _serve(environment: Mapping[str, str], port: int, flower_port: int) -> int:
    environment = {**environment, "STILLROOM_TTL": FRESH_SERVED}
    wanted = services(environment, flower_port=flower_port or None)
    console.print(f"the shop is http://127.0.0.1:{port}, its health http://127.0.0.1:{port}/status")
    if any(service.name == "flower" for service in wanted):
        flower = f"http://127.0.0.1:{flower_port}"
        environment["STILLROOM_FLOWER_URL"] = flower  # for the link on /status
        console.print(f"Flower is {flower}")
    return Supervisor([*wanted, shop_service(environment, port)]).run()


def _tell(environment: Mapping[str, str], *, verbose: bool) -> int:
    console.print(BEGIN)
    with _stage(environment, verbose=verbose) as story:
        happened = story.tell()
    console.print(f"\n{happened} of {len(story.steps)} steps happened as told.")
    if happened < len(story.steps):
        return 1
    console.print(NEXT)
    return 0


@contextmanager
def _stage(environment: Mapping[str, str], *, verbose: bool) -> Iterator[Story]:
    """Run the shop in two processes, a worker, and a recorder of what Redis is sent."""
    port, log = free_port(), io.StringIO()
    worker, *_ = services(environment, flower_port=None)
    with Recorder(environment["REDIS_URL"]) as recorder:
        with Supervisor([worker, shop_service(environment, port)], out=log):
            database = Path(environment["SHOP_DATABASE"])
            yield Story(port, database, recorder, log, console, verbose=verbose)


def main() -> None:
    """Run the demo. A mistake in the settings is a sentence and exit code 2."""
    try:
        typer.run(demo)
    except StillroomError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
