"""Which certificates connections trust and show: one context of TLS for all whose URLs say the same of it.

redis-py makes a context for each connection, and reads all authorities of the system for it. That is 40 ms of CPU,
and an event loop stands still meanwhile. Ten connections that are made at once would be late, and an outage.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from redis.asyncio.connection import RedisSSLContext
from redis.connection import parse_url

from stillroom.wire.forks import reset_after_fork

_DEFAULTS = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
_FILES = ("ca_certs", "certfile", "keyfile")
_NO_PAIR = (
    "ssl_certfile and ssl_keyfile hold no certificate and its key, or ssl_password is not the key's"
)
_WORDS = {
    "KEY_VALUES_MISMATCH": "the key in ssl_keyfile is not that of the certificate in ssl_certfile",
    "NO_CERTIFICATE_OR_CRL_FOUND": "ssl_ca_certs holds no certificate",
}


def tls_options(url: str) -> dict[str, Any]:
    """Return the options of TLS in the URL of a server, as redis-py reads them.

    A key without its password is an error: OpenSSL would ask for one on the terminal, and wait.
    """
    options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
    found = {name: value for name, value in options.items() if name.startswith("ssl_")}
    return {"ssl_password": ""} | found if "ssl_certfile" in found else found


def trust_in(url: str) -> Trust:
    """Return what a server trusts by its URL. The nodes of a cluster, whose URLs are alike, share it."""
    options = urlsplit(url).query
    trust = _known.get(options)
    if trust is None:
        trust = _known[options] = Trust(tls_options(url))
    return trust


class Trust(RedisSSLContext):
    """Make the context from redis-py's options of TLS, and again when one of its files was replaced."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        told = {**_DEFAULTS, **options}
        given = {name.removeprefix("ssl_"): value for name, value in told.items()}
        super().__init__(**given)
        of_system = ssl.get_default_verify_paths().cafile
        self._files = [path for path in (*map(given.get, _FILES), of_system) if path]
        self._made_of: list[tuple[int, ...] | None] = []
        self.reset()
        reset_after_fork(self)
        with contextlib.suppress(OSError):  # whoever connects is told
            self.get()

    def reset(self) -> None:
        """Make a lock that no other thread holds."""
        self._lock = threading.RLock()

    def get(self) -> ssl.SSLContext:
        """Return the context. Raises ssl.SSLError where a file of it can't be used."""
        with self._lock:
            found = [*map(_version_of, self._files)]
            if found != self._made_of:
                self.context = None
            try:
                context: ssl.SSLContext = super().get()
            except OSError as error:  # it is about a file, and not about the server
                raise ssl.SSLError(error.errno, self._flaw(error)) from None
            self._made_of = found
            return context

    def _flaw(self, error: OSError) -> str:
        """Return which option is behind an error. The system names no file, and OpenSSL often says "PEM lib"."""
        for name in _FILES:
            try:
                if path := getattr(self, name):
                    open(path, "rb").close()
            except OSError as unreadable:
                return f"ssl_{name} can't be read: {unreadable.strerror}"
        if self.certfile and "PEM lib" in str(error):
            return _NO_PAIR
        reason = getattr(error, "reason", "") or str(error.args[-1])
        return _WORDS.get(reason, reason)


# By the options in a URL. What no server uses any more is not kept.
_known: WeakValueDictionary[str, Trust] = WeakValueDictionary()


def _version_of(path: str) -> tuple[int, ...] | None:
    """Return what is another value once the file was replaced; None where there is none."""
    try:
        known = os.stat(path)
    except OSError:
        return None
    return known.st_mtime_ns, known.st_size, known.st_dev, known.st_ino
