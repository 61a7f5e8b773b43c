"""Files with a secret in them: read and written so that nobody else reads them, or has chosen what is in them."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import typer

from stillroom.errors import StillroomError

OWN_FILE, OWN_FOLDER = 0o600, 0o700
OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO
WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class SecretRefused(StillroomError, OSError):
    """A file or folder of secrets can't be used; the message says which and why."""


def open_folder(folder: Path) -> None:
    """Make the folder, or close it to others if they may write there. Raises SecretRefused."""
    try:
        folder.mkdir(mode=OWN_FOLDER, parents=True, exist_ok=True)
        found = folder.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise SecretRefused(f"{folder} is no folder")
        if found.st_uid not in (os.geteuid(), 0):
            raise SecretRefused(f"{folder} belongs to another user (uid {found.st_uid})")
        if found.st_mode & WRITTEN_BY_OTHERS:
            folder.chmod(OWN_FOLDER)
            typer.echo(f"{folder}: others could write here; its mode is 0700 now", err=True)
    except OSError as error:
        raise _refused(folder, error) from error


def check(path: Path) -> None:
    """Look at a secret that is there. One that others may read is closed to them, with a word to the operator.

    Raises SecretRefused for a link, for a file of another user, and for one that others may have written.
    """
    try:
        found, folder = path.lstat(), path.parent.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a link" if stat.S_ISLNK(found.st_mode) else "no plain file"
            raise SecretRefused(f"{path} is {kind}; delete it, or put the file itself there")
        if found.st_uid not in (os.geteuid(), folder.st_uid):
            raise SecretRefused(
                f"{path} belongs to another user (uid {found.st_uid}), who knows it; delete it"
            )
        if found.st_mode & WRITTEN_BY_OTHERS:
            raise SecretRefused(
                f"{path} could be written by others (mode {stat.S_IMODE(found.st_mode):o}); delete it"
            )
        if found.st_mode & OF_OTHERS:
            path.chmod(OWN_FILE)
            secret = path.name.removesuffix(".previous").removesuffix(".next")
            typer.echo(
                f"{path.name} could be read by others; its mode is 0600 now. Replace it: --rotate {secret}",
                err=True,
            )
    except OSError as error:
        raise _refused(path, error) from error


def read(path: Path) -> str:
    """Return a secret as it is sent: without the mark and the line break that editors put around it. Follows no
    link.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            text = file.read().decode("utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, error) from error
    if not text:
        raise SecretRefused(f"{path} is empty; delete it, and a new one is made")
    return text


def trim(path: Path) -> None:
    """Take off the line break behind a secret. A shell's `$(cat …)` leaves the half of one from Windows."""
    text = read(path)
    if path.stat().st_size != len(text.encode()):
        write(path, text)


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all: a half-written secret would lock everybody out.

    It is written beside under a name that nobody can have prepared, and then put in place, of a link too.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(beside, flags, OWN_FILE), "wb") as file:
            os.fchmod(file.fileno(), OWN_FILE)  # the umask may have taken more away
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _sync(folder: Path) -> None:
    """Write the new name to the disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(path: Path, error: OSError | UnicodeDecodeError) -> SecretRefused:
    if isinstance(error, SecretRefused):
        return error
    why = error.strerror if isinstance(error, OSError) else "it is no text"
    return SecretRefused(f"{path}: {why or error}")
