"""`stillroom up`: everything on this machine, one log, one Ctrl-C."""

from __future__ import annotations

from typing import Annotated

import typer

from stillroom.cli.stack import redis_url, services
from stillroom.cli.supervisor import Supervisor
from stillroom.settings import Settings
from stillroom.urls import redact


def up(
    flower_port: Annotated[
        int, typer.Option(help="Where Flower listens; 0: no Flower.", min=0, max=65_535)
    ] = 5555,
) -> None:
    """Run a worker, beat and Flower, on an embedded server if REDIS_URL is not set. Ctrl-C stops all of them."""
    with redis_url() as (url, embedded):
        settings = Settings(redis_url=url)  # a mistake is told before anything is started
        where = "an embedded server: its data ends with it" if embedded else "REDIS_URL"
        typer.echo(f"Redis is {redact(url)} ({where})")
        typer.echo(
            f"loaders: {', '.join(settings.loaders) or 'none; name modules in STILLROOM_LOADERS'}"
        )
        wanted = services({"REDIS_URL": url}, flower_port=flower_port or None)
        if any(service.name == "flower" for service in wanted):
            typer.echo(f"Flower is http://127.0.0.1:{flower_port}")
        elif flower_port:
            typer.echo("Flower is not installed: pip install 'stillroom[flower]'")
        raise typer.Exit(Supervisor(wanted).run())
