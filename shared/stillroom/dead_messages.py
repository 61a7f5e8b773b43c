"""Dead letters that are Celery messages: their form, and how one is sent again.

The body of such a letter is JSON: `{"task", "queue", "args", "kwargs"}`, or `{"queue", "raw"}` where no task
could be made of the message. Sent again it is a new message to the same queue, with nothing of the old one
but its arguments: no callbacks, no ETA, no route.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from stillroom.dead_letters import DeadLetter
from stillroom.errors import DeadLetterRefused
from stillroom.operation import Call, Operation

KIND = "message"
Publish = Callable[[str, str, list[Any], dict[str, Any]], object]  # task, queue, args, kwargs


def sender(publish: Publish, queues: Collection[str]) -> Callable[[DeadLetter], Operation[None]]:
    """Return a function whose operation sends a dead message again, to one of these queues.

    `publish` raises what the broker raises.
    """

    def send(letter: DeadLetter) -> Operation[None]:
        match _body_of(letter):
            case {"task": str(task), "queue": str(queue), "args": [*args], "kwargs": dict(kwargs)}:
                if queue not in queues:
                    reason = f"{queue!r} is no queue of this namespace; drop it"
                    raise DeadLetterRefused(letter.id, reason)
                yield Call(publish, (task, queue, args, kwargs))
            case _:
                raise DeadLetterRefused(letter.id, "no task can be made of this letter; drop it")

    return send


def _body_of(letter: DeadLetter) -> Any:
    try:
        return json.loads(letter.body)
    except (ValueError, RecursionError):
        return None
