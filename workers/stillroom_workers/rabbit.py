"""Guards a worker's connections to RabbitMQ, whose messages never were JSON in a list: channels.py is for Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from struct import pack
from typing import Any

from amqp import basic_message, exceptions, method_framing, spec
from kombu.exceptions import ContentDisallowed
from kombu.transport import pyamqp
from kombu.utils.json import dumps

from stillroom.shown import shown
from stillroom_workers.events import flaw_in_events
from stillroom_workers.hygiene import JSON, RAW_LIMIT, REASON_LENGTH, flaw_in_json

# About ten answers are waited for when a worker ends, and all have to fit into the 30 s that a container has.
ANSWERED_AT_THE_END_S = 2.0
EVENTS_EXCHANGE = "celeryev"  # its name ends so, see own_names in dispatch.py

# RabbitMQ says this of a queue or an exchange that exists with other properties. Of an order that a worker has had
# for longer than `consumer_timeout` it says the same, and names no method.
_NO_METHOD = (None, (0, 0))
_DECLARED = (spec.Queue.Declare, spec.Exchange.Declare)
# What RabbitMQ raises, and what its refusal of a message is raised as.
ERRORS = (exceptions.AMQPError, exceptions.MessageNacked)
# What it is likely to raise again at once.
AGAIN = (exceptions.IrrecoverableChannelError, exceptions.IrrecoverableConnectionError)

# A frame with a method of the server's, and one with the size and the properties of a message.
_METHOD, _CONTENT_HEADER = 1, 2
_DELIVER = pack(">HH", *spec.Basic.Deliver)
_BEFORE_PROPERTIES = 12  # bytes
_NO_PROPERTIES = b"\0\0"

# The library has no types of its own. As Any they look the same to mypy with and without stubs.
_framing: Any = method_framing
_StockContent: Any = basic_message.Message
_StockMessage: Any = pyamqp.Message
_StockChannel: Any = pyamqp.Channel
_StockConnection: Any = pyamqp.Connection
_StockTransport: Any = pyamqp.Transport


_logger = logging.getLogger(__name__)


def refusal(error: BaseException, setting: str) -> str | None:
    """Return why RabbitMQ refuses this process, as a part of a sentence, or None where another try may help.

    `setting`: the name of the setting that has the broker's URL.
    """
    said = getattr(error, "reply_text", None) or error
    if isinstance(error, exceptions.AccessRefused):
        if error.method_sig not in _NO_METHOD:
            return f"the user in {setting} lacks a right that workers need at the broker ({said})"
        return f"the broker refuses the login in {setting} ({said})"
    if isinstance(error, exceptions.NotAllowed) and "limit" not in str(said):
        return f"the broker refuses the virtual host in {setting} ({said})"
    if isinstance(error, exceptions.PreconditionFailed) and error.method_sig in _DECLARED:
        return (
            f"the broker has it with other properties: delete it, to have it declared anew ({said})"
        )
    return None


def reading_frames(connection: Any, deliver: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return the function that takes the frames of a connection: amqp's own, for messages that it can read.

    RabbitMQ takes a date behind the year 9999, bytes that are no text, and a list in a list, thousands deep. amqp
    raises errors that nobody takes for a message's: the worker exits and gives the message to the next one, which
    exits too. Such a message is delivered without its properties, and says why.
    """
    flaws: dict[int, str] = {}  # by channel: of the message that is being read

    def deliver_with_flaw(channel: int, method: Any, arguments: Any, content: Any) -> Any:
        if content is not None:
            content.flaw = flaws.pop(channel, None)
        return deliver(channel, method, arguments, content)

    take = _framing.frame_handler(connection, deliver_with_flaw)

    def take_frame(frame: Any) -> Any:
        kind, channel, payload = frame
        if kind == _METHOD and payload[:4] == _DELIVER:
            frame = kind, channel, _with_a_route_of_text(payload)
        elif kind == _CONTENT_HEADER and (flaw := _flaw_in_properties(payload)) is not None:
            flaws[channel] = flaw
            frame = kind, channel, bytes(payload[:_BEFORE_PROPERTIES]) + _NO_PROPERTIES
        return take(frame)

    return take_frame


def _with_a_route_of_text(payload: Any) -> Any:
    """Return the start of a delivery, with question marks for what is no ASCII in its routing key.

    Whoever may publish to an exchange without routes, such as that of remote control, writes any key.
    """
    tag = 4
    exchange = tag + 1 + payload[tag] + 9  # behind the message's number and whether it comes again
    key = exchange + 1 + payload[exchange] + 1
    if bytes(payload[key:]).isascii():
        return payload
    return bytes(payload[:key]) + bytes(one if one < 128 else 63 for one in payload[key:])


def _flaw_in_properties(payload: Any) -> str | None:
    """Return why the properties of a message can't be read, or could not be written into a dead letter; or None."""
    content = _StockContent()
    try:
        content.inbound_header(payload)
        flaw = flaw_in_json(dumps(content.properties))
    except Exception as error:  # whatever amqp raises
        flaw = repr(error)
    return None if flaw is None else f"its properties can't be read: {flaw}"


class Message(_StockMessage):  # type: ignore[misc]
    """A message that is not unfolded. Stock makes 200 MB of 200 kB before anybody can look at it."""

    def __init__(self, msg: Any, channel: Any = None, **options: Any) -> None:
        flaw = getattr(msg, "flaw", None)
        if (msg.properties.get("application_headers") or {}).get("compression"):
            flaw = "it is compressed; Stillroom unfolds nothing"
        if flaw is not None:
            self.errors = [(ContentDisallowed, ContentDisallowed(flaw), None)]
        super().__init__(msg, channel, **options)


class Channel(_StockChannel):  # type: ignore[misc]
    """A channel that waits for nobody's word but a task's."""

    Message = Message

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Stock takes a message's encoding for the name of a codec of Python: `punycode` needs hours for 1 MB.
        self.auto_decode = False

    def basic_consume(self, *args: Any, callback: Any = None, **options: Any) -> Any:
        """Take messages. An event is looked at before it is handed on: whoever watches keeps each of them."""
        sifting = callback and partial(self._sift, callback)
        return super().basic_consume(*args, callback=sifting, **options)

    def _sift(self, deliver: Callable[[Any], None], raw: Any) -> None:
        is_event = str(raw.delivery_info["exchange"]).endswith(EVENTS_EXCHANGE)
        flaw = self._flaw_in_events(raw) if is_event else None
        if flaw is None:
            deliver(raw)
            return
        why = shown(flaw, REASON_LENGTH)
        _logger.warning("An event of %d bytes is dropped: %s", len(raw.body), why)

    def _flaw_in_events(self, raw: Any) -> str | None:
        if len(raw.body) > RAW_LIMIT:
            return f"it has {len(raw.body):,} bytes, and may have {RAW_LIMIT:,}"
        message = self.Message(raw, channel=self, accept={JSON})
        try:
            if message.errors:
                message._reraise_error()
            return flaw_in_events(message.decode())
        except Exception as error:  # a body that is not what its sender says it is
            return repr(error)

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

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"frame_handler": reading_frames, **options})

    def close(self, *args: Any, **options: Any) -> Any:
        """Close. The answer is waited for as long as any at the end of a worker.

        Stock waits for ever. In a worker with greenlets one of them does, in the connection of remote control, and
        the worker waits for it.
        """
        if self.connected:
            self.transport.sock.settimeout(ANSWERED_AT_THE_END_S)
        return super().close(*args, **options)


class Transport(_StockTransport):  # type: ignore[misc]
    """kombu's transport for RabbitMQ with guarded connections."""

    Connection = Connection
