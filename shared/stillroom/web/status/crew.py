"""The workers by name, as a table. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from stillroom.health.report import TaskStats, WorkerStats
from stillroom.web.status.html import Html, el
from stillroom.web.status.numbers import UNKNOWN, ago, amount, said, span
from stillroom.web.status.tables import Column, table

COLUMNS = (
    Column("Worker", is_name=True),
    Column("Queues"),
    Column("Seen"),
    Column("Busy", is_number=True),
    Column("Tasks/min", is_number=True),
    Column("Done", is_number=True),
    Column("Failed", is_number=True),
    Column("Up", is_number=True),
)
GONE_S = 30.0  # one that was not seen for so long does not count as a worker


def crew(tasks: TaskStats | None) -> Html:
    """Show the worker first that was seen last."""
    return el("section", el("h2", "Workers", id="workers"), _told(tasks))


def _told(tasks: TaskStats | None) -> Html:
    if tasks is None or tasks.crew is None:
        return el("p", "Unknown: they say so in Redis, which does not tell it.")
    if not tasks.crew:
        return el("p", "No worker was seen in the last ten minutes.", class_="nothing")
    return table(COLUMNS, [list(_row(one)) for one in tasks.crew], "workers")


def _row(worker: WorkerStats) -> Iterator[str]:
    yield worker.name
    yield ", ".join(queue.rpartition(".")[2] for queue in worker.queues) or UNKNOWN
    yield ago(worker.seen_s) + (": gone?" if worker.seen_s > GONE_S else "")
    yield _busy(worker)
    yield said(worker.per_min, amount)
    yield said(worker.done, amount)
    yield said(worker.failed, amount)
    yield said(worker.up_s, span)


def _busy(worker: WorkerStats) -> str:
    if worker.busy is None or worker.threads is None:
        return said(worker.busy, amount)
    return f"{amount(worker.busy)} of {amount(worker.threads)}"
