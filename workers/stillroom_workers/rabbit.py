"""Guards a worker's connections to RabbitMQ, whose messages never were JSON in a list: see guards.py for Redis."""

from __future__ import annotations

from typing import Any

from kombu.exceptions import ContentDisallowed
from kombu.transport import pyamqp

# The library has no types of its own. As Any they look the same to mypy with and without stubs.
_StockMessage: Any = pyamqp.Message
_StockChannel: Any = pyamqp.Channel
_StockConnection: Any = pyamqp.Connection
_StockTransport: Any = pyamqp.Transport


class Message(_StockMessage):  # type: ignore[misc]
    """A message that is not unfolded. Stock makes 200 MB of 200 kB before anybody can look at it."""

    def __init__(self, msg: Any, channel: Any = None, **options: Any) -> None:
        if (msg.properties.get("application_headers") or {}).get("compression"):
            error = ContentDisallowed("it is compressed; Stillroom unfolds nothing")
            self.errors = [(ContentDisallowed, error, None)]
        super().__init__(msg, channel, **options)


class Channel(_StockChannel):  # type: ignore[misc]
    """A channel that waits for nobody's word but a task's."""

    Message = Message

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Stock takes a message's encoding for the name of a codec of Python: `punycode` needs hours for 1 MB.
        self.auto_decode = False

    def basic_publish_confirm(
        self, *args: Any, confirm_timeout: float | None = None, **options: Any
    ) -> Any:
        """Publish, and wait until RabbitMQ has confirmed it, where the sender says for how long: of a task.

        RabbitMQ confirms nothing while it is short of memory or of disk. Events and replies come from the thread
        that takes messages: it would take none until somebody has made room, and nobody else empties the queues.
        """
        if confirm_timeout is None:
            return self._basic_publish(*args, **options)
        return super().basic_publish_confirm(*args, confirm_timeout=confirm_timeout, **options)


class Connection(_StockConnection):  # type: ignore[misc]
    """A connection with guarded channels."""

    Channel = Channel


class Transport(_StockTransport):  # type: ignore[misc]
    """kombu's transport for RabbitMQ with guarded connections."""

    Connection = Connection
