"""A Celery app that does what Stillroom's settings say, whatever else of Celery is in its process or environment.

Stock Celery lets the environment win over what an app was told (CELERY_BROKER_URL and three like it), reads
the module that CELERY_CONFIG_MODULE names, takes CELERY_WORKER_POOL and others for options of its command, takes
over the tasks that other apps of the process share, and with Django makes itself the default app of the process.
A project that has a Celery app of its own sets all of these for that app.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import celery
import click
from celery import _state

# Celery imports the others with its first message. A child that is forked just then could never import them.
from celery.app import amqp, events, task, utils  # noqa: F401
from celery.backends import base  # noqa: F401
from celery.loaders.app import AppLoader
from celery.local import maybe_evaluate

# A variable that Celery would read from the environment → the setting of ours in its place.
AMBIENT = {
    "CELERY_BROKER_URL": "STILLROOM_BROKER_URL or REDIS_URL",
    "CELERY_BROKER_READ_URL": "STILLROOM_BROKER_URL or REDIS_URL",
    "CELERY_BROKER_WRITE_URL": "STILLROOM_BROKER_URL or REDIS_URL",
    "CELERY_RESULT_BACKEND": "STILLROOM_RESULT_BACKEND",
    "CELERY_CONFIG_MODULE": "STILLROOM_… variables",
    "CELERY_LOADER": "STILLROOM_LOADERS",
}

# … and how the names of those begin that Celery's command line takes for its options.
AMBIENT_OPTIONS = ("CELERY_WORKER_", "CELERY_BEAT_")

# Longer than a queue on most nodes of a cluster needs to write to their disks.
CONFIRMED_WITHIN_S = 2.0

# Neither has types of its own. As Any they look the same to mypy with and without stubs.
_StockCelery: Any = celery.Celery
_StockSettings: Any = utils.Settings
_StockLoader: Any = AppLoader
_registry: Any = _state


class OwnCelery(_StockCelery):  # type: ignore[misc]
    """A Celery app for itself: nothing around it changes it, and it changes nothing around it."""

    finalized: bool

    def __init__(self, *, broker: str, fixups: set[str] | None = None, **options: Any) -> None:
        """`broker` is its URL. `fixups` are Celery's patches for frameworks: none unless given."""
        super().__init__(
            "stillroom",
            broker=broker,
            set_as_current=False,
            loader=f"{__name__}:Loader",  # by name: Celery's patch for Django looks for its own in there
            fixups=fixups or set(),
            **options,
        )
        # Its attributes are the settings themselves, so a plain assignment would only set one more.
        object.__setattr__(self._conf, "__class__", Configuration)
        _registry._deregister_app(
            self
        )  # else `@shared_task` puts its task into each app of the process

    def send_task(self, *args: Any, **options: Any) -> Any:
        """Send a task. RabbitMQ has a while to confirm it: short of memory or disk, it says nothing at all."""
        return super().send_task(*args, **{"confirm_timeout": CONFIRMED_WITHIN_S, **options})

    def finalize(self, auto: bool = False) -> None:
        """Bind the tasks of this app. Stock also makes those that other modules share, and Celery's own."""
        with self._finalize_mutex:
            if self.finalized:
                return
            self.finalized = True
            while self._pending:
                maybe_evaluate(self._pending.popleft())
            for task in self._tasks.values():
                task.bind(self)
            self.on_after_finalize.send(sender=self)


class Loader(_StockLoader):  # type: ignore[misc]
    """Celery's loader, which reads no module of settings."""

    def read_configuration(self, env: str = "") -> Mapping[str, Any]:
        return {}


class Configuration(_StockSettings):  # type: ignore[misc]
    """An app's configuration, which looks into no environment."""

    @property
    def broker_url(self) -> Any:
        return self.get("broker_url")

    @property
    def broker_read_url(self) -> Any:
        return self.get("broker_read_url") or self.broker_url

    @property
    def broker_write_url(self) -> Any:
        return self.get("broker_write_url") or self.broker_url

    @property
    def result_backend(self) -> Any:
        return self.get("result_backend")


def ignored() -> list[str]:
    """Return a sentence for each of Celery's variables that is set and has no effect here."""
    options = {
        name: "STILLROOM_… variables, and options of the command line"
        for name in sorted(os.environ)
        if name.startswith(AMBIENT_OPTIONS)
    }
    return [
        f"{name} is set and has no effect on Stillroom, whose settings are {instead}"
        for name, instead in {**AMBIENT, **options}.items()
        if os.environ.get(name)
    ]


def read_no_options() -> None:
    """Let no variable stand for an option of the `celery` command that runs: they are of the project's workers.

    CELERY_WORKER_POOL would be `--pool`, CELERY_WORKER_PURGE would empty our queues.
    """
    context = click.get_current_context(silent=True)
    if context is not None:
        context.find_root().auto_envvar_prefix = None
