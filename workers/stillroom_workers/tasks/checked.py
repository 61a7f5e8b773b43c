"""How a task takes its arguments: one pydantic model, unknown fields refused, one clear line if they don't fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom import UnknownLoader
from stillroom.cache.loaders import BadArguments

log = logging.getLogger("stillroom.workers")

Order = TypeVar("Order", bound=BaseModel)
Report = dict[str, Any]


class NoArguments(BaseModel):
    """The message of a task that finds its work in Redis."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def checked(model: type[Order], work: Callable[[Order], Report]) -> Callable[..., Report]:
    """A task body: check the message, then do the work.

    A message that does not fit will not fit next time either: it is refused and reported, not retried. The line
    that says so names fields, never their contents.
    """

    def run(*args: Any, **fields: Any) -> Report:
        try:
            if args:
                raise BadArguments(
                    f"{len(args)} positional arguments; this task takes named ones only"
                )
            return work(model.model_validate(fields))
        except ValidationError as error:
            return _refused(model, "; ".join(_complaint(detail) for detail in error.errors()))
        except (BadArguments, UnknownLoader) as error:
            return _refused(model, str(error))

    return run


def _refused(model: type[BaseModel], reason: str) -> Report:
    log.error("%s refused: %s", model.__name__, reason)
    return {"outcome": "refused", "reason": reason}


def _complaint(detail: Any) -> str:
    return f"{'.'.join(map(str, detail['loc'])) or 'arguments'}: {detail['msg']}"
