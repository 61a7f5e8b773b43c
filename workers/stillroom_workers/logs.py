"""The log of a worker: one entry is one line whatever is in it, and what follows that line is indented."""

from __future__ import annotations

import logging
from typing import Any

from celery.app import log
from celery.utils.log import ColorFormatter

from stillroom.shown import shown_lines

# celery's types differ with and without stubs; as Any they look the same to mypy.
_StockLogging: Any = log.Logging
_StockFormatter: Any = ColorFormatter

FAMILIES = ("celery", "kombu", "stillroom", "stillroom_workers")


class Logging(_StockLogging):  # type: ignore[misc]
    """Celery's own logging, with formatters that show every text as text."""

    def setup_handlers(self, *args: Any, formatter: Any = _StockFormatter, **options: Any) -> Any:
        return super().setup_handlers(*args, formatter=_showing(formatter), **options)


def enable() -> None:
    """Enable the worker's loggers.

    `logging.config` disables all that exist, unless it is told not to. An app that configures its log as the
    documentation of Flask shows would silence the worker that imports it, and the reason why that can't start.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in FAMILIES and isinstance(logger, logging.Logger):
            logger.disabled = False


def _showing(stock: Any) -> Any:
    class Showing(stock):  # type: ignore[misc]
        def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
            record.message = shown_lines(record.message)
            return str(super().formatMessage(record))

        def formatException(self, ei: Any) -> str:  # noqa: N802  # logging's name
            return shown_lines(str(super().formatException(ei)))

    return Showing
