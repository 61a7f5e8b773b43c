"""Checks a task's arguments by one pydantic model: unknown fields are refused, and one clear line says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from kombu.utils.json import dumps
from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom import OrderRefused, RedisUnavailable, UnknownLoader
from stillroom.cache.loaders import BadArguments
from stillroom.shown import complaints, shown
from stillroom_workers.tasks.worker_app import WorkerApp

log = logging.getLogger("stillroom.workers")

Order = TypeVar("Order", bound=BaseModel)
Report = dict[str, Any]


class NoArguments(BaseModel):
    """The message of a task that finds its work in Redis."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def register_task(
    app: WorkerApp,
    name: str,
    model: type[Order],
    work: Callable[[Order], Report],
    **options: Any,
) -> None:
    """Make a task of the app: it checks its message, then does the work.

    A message that does not fit will not fit next time either: the task fails with OrderRefused, and its order is
    kept as a dead letter. What is logged names fields, never their contents. Celery's JSON also has dates, UUIDs
    and Decimals, which no order has: `int(Decimal("1E+999999999"))` never ends.

    Redis that is away, or refuses, fails the task, and one sentence each half minute tells why. Celery's own line
    has a traceback, which shows where it was noticed and nothing of the cause.
    """

    def run(*args: Any, **fields: Any) -> Report:
        try:
            if args:
                raise BadArguments(
                    f"{len(args)} positional arguments; this task takes named ones only"
                )
            return work(model.model_validate_json(dumps(fields)))
        except ValidationError as error:
            reason = complaints(error)
        except (BadArguments, UnknownLoader) as error:
            reason = str(error)
        except RedisUnavailable as error:
            app.room.stats.say(f"{name} could not be done", error.reason, error, logging.ERROR)
            raise
        refuse(app, name, args, fields, reason)
        raise OrderRefused(f"{model.__name__} refused: {shown(reason)}")

    app.task(run, name=name, throws=(OrderRefused, RedisUnavailable), **options)


def refuse(
    app: WorkerApp, task: str, args: Sequence[Any], fields: Mapping[str, Any], reason: str
) -> None:
    """Say that an order does not fit, count it, and keep it as a dead letter."""
    log.error("an order of %s is refused: %s", task, shown(reason))
    app.letters.refuse(task, args, fields, reason)
