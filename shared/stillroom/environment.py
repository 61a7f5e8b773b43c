"""Reads settings from the environment, and secrets from the files that it names.

Refuses names that are no setting, and says which one was probably meant.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from collections.abc import Container, Iterable, Mapping

from stillroom.errors import SettingsError
from stillroom.readable import watch

PREFIX = "STILLROOM_"
SECRET_LIMIT = 64 * 1024  # bytes of a file
PIPE_WITHIN_MS = 5_000

# Kubernetes sets SERVICE and PORT in every pod for a Service that is called stillroom.
# IMAGE is for stack.yml: it is in the shell that deploys, where commands run too.
_NO_SETTING = re.compile(r"STILLROOM_((SERVICE|PORT)_?|IMAGE$)")

# Settings that may come from a file: setting → its name in the environment, to which `_FILE` is added.
SECRETS = {
    "redis_password": "REDIS_PASSWORD",
    "sentinel_password": "STILLROOM_SENTINEL_PASSWORD",
    "session_peppers": "STILLROOM_SESSION_PEPPERS",
    "health_token": "STILLROOM_HEALTH_TOKEN",
    "webhook_url": "STILLROOM_WEBHOOK_URL",
    "webhook_secret": "STILLROOM_WEBHOOK_SECRET",
}

# What redis-py, Django, Flask and other caches call it → the setting.
ELSEWHERE = {
    **dict.fromkeys(
        ("host", "port", "db", "username", "url", "uri", "location", "server"), "redis_url"
    ),
    **dict.fromkeys(("prefix", "key_prefix", "keyprefix"), "namespace"),
    **dict.fromkeys(("timeout", "default_timeout", "default_ttl", "expire", "expires"), "ttl"),
    **dict.fromkeys(("secret", "secret_key", "salt"), "session_peppers"),
    "socket_timeout": "command_timeout",
    "socket_connect_timeout": "connect_timeout",
    "max_connections": "pool_size",
    "sentinels": "redis_url",
}


def read_environment(names: Mapping[str, str], but: Container[str]) -> dict[str, str]:
    """Return what the environment says, by field, without the settings that code gives by either name.

    `names`: the name of each setting in the environment. Raises SettingsError, also for an unknown name.
    """
    _refuse_unknown(os.environ, names.values())
    environment = {name.upper(): value for name, value in os.environ.items()}
    said = {}
    for field, name in names.items():
        if field in but or name in but:
            continue
        value = _secret(name, environment) if field in SECRETS else environment.get(name)
        if value is not None:
            said[field] = value
    return said


def _refuse_unknown(environment: Mapping[str, str], names: Iterable[str]) -> None:
    known = {*names, *(f"{name}_FILE" for name in SECRETS.values())}
    given = [n for n in environment if n.upper().startswith(PREFIX) and not _NO_SETTING.match(n)]
    unknown = sorted(name for name in given if name.upper() not in known)
    if unknown:
        raise SettingsError("\n".join(unknown_setting(name, known) for name in unknown))


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """Return the sentence about a name that is no setting."""
    return f"{name} is not a setting{meant_setting(name, known)}"


def meant_setting(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?`, or nothing. `known`: the names as they are written where this one was.

    They are compared without the prefix, which some names lack, as REDIS_URL does. A name of another library's is
    no slip of the pen: `host` is like `otel`, and means the URL.
    """
    whole = {one.upper().removeprefix(PREFIX): one for one in known}
    given = name.upper().removeprefix(PREFIX)
    meant = ELSEWHERE.get(given.lower(), "").upper()
    near = [meant] if meant in whole else difflib.get_close_matches(given, whole, n=1)
    return f"; did you mean {whole[near[0]]}?" if near else ""


def _secret(name: str, environment: Mapping[str, str]) -> str | None:
    """Return a secret from its variable or its file, without the line break behind it.

    A shell that reads a `.env` file from Windows leaves the half of one. A variable that is set to nothing is not
    set.
    """
    value = environment.get(name, "").rstrip("\r\n") or None
    path = environment.get(f"{name}_FILE")
    if not path:
        return value
    if value is not None:
        raise SettingsError(f"{name} and {name}_FILE are both set; keep one")
    try:
        secret = _secret_in(path).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"{name}_FILE: {path}: {why}") from None
    if not secret.strip():
        raise SettingsError(f"{name}_FILE: {path}: it is empty")
    return secret


def _secret_in(path: str) -> str:
    """Read a file, or a pipe as a shell's `<(pass redis)`. One that nobody writes to would hold up the start."""
    with open(path, "rb", opener=_open_at_once) as file:
        is_plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)  # for which epoll cannot wait
        if not is_plain and not watch(file)(PIPE_WITHIN_MS):
            raise OSError(errno.ETIMEDOUT, "nobody writes to this pipe")
        os.set_blocking(file.fileno(), True)
        secret = file.read(SECRET_LIMIT + 1)
    if len(secret) > SECRET_LIMIT:
        raise OSError(errno.EFBIG, f"it has more than {SECRET_LIMIT:,} bytes")
    return secret.decode("utf-8-sig")  # some editors begin a text with a mark


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
