"""Celery's worker program as Stillroom starts it: under a name of its own, and only if it can work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import click
from celery import signals
from celery.app import trace
from celery.apps import worker
from celery.utils.nodenames import default_nodename, nodename, nodesplit
from celery.utils.text import str_to_list
from click.core import ParameterSource

from stillroom import SettingsError
from stillroom.dispatch import REFRESH_MANY_TASK, REFRESH_TASK
from stillroom.errors import did_you_mean
from stillroom_workers import guards
from stillroom_workers.lifecycle import begin, ending_the_process, ending_where_refused

log = logging.getLogger("stillroom.workers")

# celery's types differ with and without stubs; as Any they look the same to mypy.
_StockWorker: Any = worker.Worker
_trace: Any = trace

POOL = "threads"  # the work waits on Redis and on loaders; threads stop in half a second, prefork has hung
GEVENT = "celery.concurrency.gevent"
NAMES_SHOWN = 3  # loaders that the name of a task tells
# What ends a task or its process from outside. Only prefork can, and gevent the first.
FROM_OUTSIDE = ("time_limit", "soft_time_limit", "max_tasks_per_child", "max_memory_per_child")
STOCK_BEAT, OUR_BEAT = "celery.worker.components:Beat", "stillroom_workers.beat:Beat"


class Worker(_StockWorker):  # type: ignore[misc]
    """A worker that is ready when its room is open, or ends with a sentence and exit code 1."""

    pool_cls: Any

    class Blueprint(_StockWorker.Blueprint):  # type: ignore[misc]
        default_steps = _StockWorker.Blueprint.default_steps - {STOCK_BEAT} | {OUR_BEAT}

    def __init__(self, app: Any = None, hostname: str | None = None, **options: Any) -> None:
        ours = app or self.app
        # Neither helps here. Gossip reads the events of all workers; mingle holds up each start for a second.
        alone = {"without_gossip": True, "without_mingle": True}
        # Celery's heart shows our signs of life too: slower or without it each container would be taken for dead.
        alive = {"without_heartbeat": False, "heartbeat_interval": None}
        with ending_the_process():
            super().__init__(
                app=ours,
                hostname=node_name(ours.settings.namespace, hostname),
                **options | alone | alive | _pool(**options) | _scale(**options),
            )

    def on_before_init(self, **options: Any) -> None:
        """Look which app is the current one: Celery makes ours that here, and with Django it was the project's."""
        self.app.neighbour.look()
        super().on_before_init(**options)

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """Refuse a queue that is not ours, which the worker would find empty for ever."""
        known = [queue.name for queue in self.app.conf.task_queues]
        for name in [*(str_to_list(include) or ()), *(str_to_list(exclude) or ())]:
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {' and '.join(known)}"
                raise SettingsError(f"{name!r} is no queue of Stillroom{hint}")
        super().setup_queues(include, exclude)

    def on_init_blueprint(self) -> None:
        """Begin the process: the worker's parts are chosen after this, and its log is set up."""
        super().on_init_blueprint()
        self.pool_cls = _stoppable(self.pool_cls)
        scales = self.pool_cls.uses_semaphore or hasattr(self.pool_cls, "grow")
        if self.options.get("autoscale") and not scales:
            raise SettingsError("--autoscale is for processes: add --pool prefork, or leave it out")
        if not self.pool_cls.uses_semaphore:
            self._tell_what_is_idle()
        with self.app.neighbour.at_home():  # a loaders module may look at its project's tasks
            begin(self.app)
            self.app.neighbour.look()
        signals.worker_process_init.connect(self.app.neighbour.move_in)

    def _tell_what_is_idle(self) -> None:
        """Log the options that this pool ignores. Whoever gives a limit relies on it."""
        idle = FROM_OUTSIDE[self.pool_cls.__module__ == GEVENT :]
        given = [f"--{name.replace('_', '-')}" for name in idle if getattr(self, name)]
        if given:
            log.warning(
                "without effect in this pool: %s. Add --pool prefork, or give the loaders timeouts of their own",
                ", ".join(given),
            )

    def on_start(self) -> None:
        """Let the project move in: the pool has been made, and runs nothing yet."""
        super().on_start()
        self.app.threads = self.max_concurrency or self.concurrency  # the first is --autoscale's
        self.app.neighbour.move_in()


class Consumer(guards.Consumer):
    """Takes messages from Stillroom's queues, and calls each by what it is about."""

    def start(self) -> None:
        """Take messages until the worker stops."""
        with ending_where_refused(self.app.settings):
            super().start()

    def update_strategies(self) -> None:
        """Make the functions that run tasks by the maker that is in force now.

        Sentry puts itself in front of that when the loaders' app is imported. Stock took it long before, and Sentry
        heard of no load that failed.
        """
        super().update_strategies()
        for name, task in self.app.tasks.items():
            task.__trace__ = _trace.build_tracer(
                name, task, self.app.loader, self.hostname, app=self.app
            )

    def shown_name(self, task: str, fields: Any) -> str:
        """Return the name of a task with its loader, as in `stillroom.refresh: product`.

        Only what is the name of a loader here is shown: names in Flower and its metrics are kept for ever.
        """
        orders = {REFRESH_TASK: [fields], REFRESH_MANY_TASK: fields.get("orders")}.get(task)
        asked = {name for order in orders or () for name in _loader_of(order)}
        known = sorted(name for name in asked if name in self.app.room.cache.loaders)
        if not known:
            return task
        return (
            f"{task}: {', '.join(known) if len(known) <= NAMES_SHOWN else f'{len(known)} loaders'}"
        )


def _pool(pool: Any = None, pool_cls: Any = None, **_: Any) -> dict[str, Any]:
    """Return the pool that was named, or ours. Celery's command has prefork for none, as if it had been named."""
    command = click.get_current_context(silent=True)
    is_named = (
        command is None or command.get_parameter_source("pool") is not ParameterSource.DEFAULT
    )
    return {"pool": (is_named and (pool or pool_cls)) or POOL}


def _scale(autoscale: Any = None, **_: Any) -> dict[str, Any]:
    """Return how many processes there may be, and how few. With none at most, a worker takes messages for ever."""
    if not autoscale:
        return {}
    most, *least = map(int, autoscale.split(",") if isinstance(autoscale, str) else autoscale)
    if most < 1 or min(least, default=0) < 0:
        raise SettingsError(
            "--autoscale takes the most processes, at least 1, and the fewest: 10,2"
        )
    return {"autoscale": (most, *(least or [0]))}


def _stoppable(pool: Any) -> Any:
    """Return the pool; gevent's as one that a signal can stop, whatever it was told.

    gevent calls the handler of SIGQUIT or of a second Ctrl-C in its event loop, where nothing can wait. Stock waits
    there for the tasks that it has just ended, which raises an error. The worker itself waits for them behind the
    handler.
    """
    if pool.__module__ != GEVENT:
        return pool

    class Stoppable(pool):  # type: ignore[misc]
        __module__ = GEVENT  # the worker's banner names its pool by this

        def shrink(self, n: int = 1) -> None:
            """Give places up, and keep one: with none what was taken waits for ever, and so does SIGTERM."""
            super().shrink(min(n, self.limit - 1))

        def on_stop(self) -> None:
            from gevent import get_hub, getcurrent

            if getcurrent() is not get_hub():
                super().on_stop()

    return Stoppable


def _loader_of(order: Any) -> Iterator[str]:
    match order:
        case {"loader": str(name)}:
            yield name


def node_name(namespace: str, hostname: str | None) -> str:
    """Return the name of a worker with its namespace, as in `celery@stillroom-web1`.

    Other apps on this machine have workers too, by default all of one name.

    >>> node_name("stillroom", "w1@web1"), node_name("stillroom", "celery@stillroom-web1")
    ('w1@stillroom-web1', 'celery@stillroom-web1')
    """
    name, host = nodesplit(default_nodename(hostname or ""))
    prefix = f"{namespace}-"
    return str(nodename(str(name), host if host.startswith(prefix) else prefix + host))
