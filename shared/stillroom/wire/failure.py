"""Sort errors of the socket, of TLS, of a name server and of redis-py: one word for each, and no address."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import hiredis

import redis
from stillroom.errors import RedisUnavailable
from stillroom.wire.names import NameUnanswered

# The other side accepted the connection and closed it, perhaps before TLS was agreed on.
_CUT_OFF = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)

# What the other side says of a handshake, in OpenSSL's words.
_ALERTS = {
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know the authority of the certificate in ssl_certfile",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the server says that the certificate in ssl_certfile has expired",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server wants a certificate of its clients: ssl_certfile",
    "WRONG_VERSION_NUMBER": "what answers there speaks no TLS",
}

# What OpenSSL says of a certificate that Python before 3.13 took.
_STRICTER = {
    "Basic Constraints of CA cert not marked critical",
    "CA cert does not include key usage extension",
    "Missing Authority Key Identifier",
    "Missing Subject Key Identifier",
}

# No descriptor is free for a connection, here or on this machine. That says nothing about the server.
_OUR_WANT = (errno.EMFILE, errno.ENFILE)


def unavailable(error: BaseException) -> RedisUnavailable | None:
    """Return an error of the socket or of redis-py as RedisUnavailable, or None if it is not Redis' fault."""
    if isinstance(error, RedisUnavailable):
        return error
    if not isinstance(error, OSError | EOFError | redis.RedisError | hiredis.HiredisError):
        return None
    reason, detail = _reason(error, _cause(error))
    return RedisUnavailable(reason, detail)


def _reason(error: BaseException, cause: OSError | None) -> tuple[str, str]:
    """Return (one word, the system's own words)."""
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return "auth", str(error)
    if isinstance(error, redis.exceptions.BusyLoadingError):
        return "loading", ""
    if cause is not None and cause.errno in _OUR_WANT:
        return "pool", os.strerror(cause.errno)
    if isinstance(cause, socket.gaierror):
        return "name", str(cause.strerror)
    if isinstance(cause, _CUT_OFF):
        number = None if isinstance(cause, ssl.SSLError) else cause.errno
        return "closed", os.strerror(number) if number else "by the other side"
    if isinstance(cause, ssl.SSLError):
        return "tls", _of_tls(cause)
    if isinstance(cause, TimeoutError) or isinstance(error, redis.TimeoutError):
        return "timeout", str(cause) if isinstance(cause, NameUnanswered) else ""
    if isinstance(error, ConnectionRefusedError | redis.ConnectionError):
        return "refused", _without_address(error, cause)
    if isinstance(error, redis.RedisError | hiredis.HiredisError):
        return "protocol", str(error)
    return "closed", _without_address(error, cause)


def is_turned_away(failure: RedisUnavailable | None) -> bool:
    """Return whether a server has closed a new connection at once, as one does that has as many as it may.

    That says nothing about the connections that it has. What it said before it closed may be lost.
    """
    return failure is not None and failure.reason == "closed"


def _cause(error: BaseException) -> OSError | None:
    """Return the system's own error, which redis-py wraps."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _of_tls(error: ssl.SSLError) -> str:
    words = getattr(error, "verify_message", "") or getattr(error, "reason", "")
    if words in _STRICTER:
        return f"{words}, which Python 3.13 and newer want"
    return _ALERTS.get(words, words) or str(error.args[-1])


def _without_address(error: BaseException, cause: OSError | None) -> str:
    """Return the system's words without the address, because more people read logs than settings."""
    if cause is None:
        return str(error)  # redis-py's own, of a connection that it has
    return os.strerror(cause.errno) if cause.errno else "none of its addresses answers"
