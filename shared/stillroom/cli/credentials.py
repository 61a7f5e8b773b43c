"""`stillroom secrets`: what the stack's services prove themselves with, made once and replaced without a pause.

One file for each secret, readable by its owner alone; `users.acl` for servers and `sentinels.acl` for Sentinels,
which hold hashes only. While a password is replaced a server takes the new one and the one before it: processes
change over one by one.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cli import secret_files
from stillroom.cli.secret_files import SecretRefused
from stillroom.cli.tables import AsJson, print_json
from stillroom.errors import StillroomError, did_you_mean
from stillroom.keys import globs_on_a_cluster
from stillroom.settings import Settings
from stillroom.shown import shown

USERS, SENTINELS = (files("stillroom") / "cli" / name for name in ("users.acl", "sentinels.acl"))
ROLE = re.compile(r"#<(\w+)>")
KEYS_OF_A_ROLE = re.compile(r"(%R~|~)<ns>:([^\s)]+)")
ON_A_CLUSTER = re.compile(r" <on a cluster: ([^>]*)>")
ON_ONE_SERVER = re.compile(r" <on one server: ([^>]*)>")
PEPPERS, TOKEN = "session_peppers", "health_token"
FLOWER = "flower_config"
# Redis logs in with these itself: each is one word of a line in its configuration, see deploy/.
WORDS, NO_WORD = ("replica_password", "sentinel_password"), re.compile(r"[\s\"']")
RING = 3  # peppers kept: as many rotations as a session may outlive
BITS = 256  # of chance in each: no guess reaches it, so a plain SHA-256 may be read by anybody


class UnknownSecret(StillroomError, LookupError):
    """The stack has no secret of this name."""


class NothingToPromote(StillroomError, LookupError):
    """No new value of this secret waits to be used first, or no process can have it yet."""


Folder = Annotated[
    Path, typer.Argument(help="The folder of the secrets. It is made if it does not exist.")
]
Rotate = Annotated[
    list[str] | None,
    typer.Option(
        help="Replace this secret, named as its file; the old one still works. For peppers: add one to read with."
    ),
]
Promote = Annotated[
    list[str] | None,
    typer.Option(
        help="For peppers, once every process has the new one: hash new sessions with it."
    ),
]
Forget = Annotated[list[str] | None, typer.Option(help="Forget the former value of this secret.")]


def write_secrets(
    folder: Folder,
    rotate: Rotate = None,
    promote: Promote = None,
    forget: Forget = None,
    as_json: AsJson = False,
) -> None:
    """Make what is missing: a password per role, peppers, Flower's login. Write the ACL files: hashes."""
    rotate, promote, forget = rotate or [], promote or [], forget or []
    # First all that may be refused: a password that is replaced and not in the ACL file locks processes out.
    settings = Settings()
    _refuse_unknown([*rotate, *promote, *forget])
    secret_files.open_folder(folder)
    _check_files(folder)
    for name in promote:
        _refuse_to_promote(folder, name, rotate)
    for name in rotate:
        _rotate(folder, name)
    for name in promote:
        _promote(folder, name)
    for name in forget:
        _forget(folder, name)
    for name in names():
        if not (folder / name).exists():
            secret_files.write(folder / name, _new(name))
    for rules in (USERS, SENTINELS):
        secret_files.write(folder / rules.name, acl_file(folder, rules, settings))
    made = sorted(path.name for path in folder.iterdir())
    said = shown(f"{folder}: {', '.join(made)}")
    print_json({"folder": str(folder), "files": made}) if as_json else typer.echo(said)


def _check_files(folder: Path) -> None:
    """Check and trim each file that is there. Raises SecretRefused."""
    for path in _all_there_may_be(folder):
        if os.path.lexists(path):
            secret_files.check(path)
            if path.name != FLOWER:  # Python, which its end of line belongs to
                secret_files.trim(path)
            if path.name in WORDS and NO_WORD.search(secret_files.read(path)):
                raise SecretRefused(
                    f"{path} has a space or a quotation mark in it, which ends a word of Redis' configuration; "
                    f"choose another password, or delete it, and a new one is made"
                )


def _all_there_may_be(folder: Path) -> Iterator[Path]:
    """Return every file of every secret: the current value, the former one, and the waiting one."""
    for name in names():
        path = folder / name
        yield from (path, _previous(path), _next(path))


def names() -> list[str]:
    """Return the name of every secret of the stack."""
    everybody = {*roles(USERS), *roles(SENTINELS)}
    return [*map(_password, sorted(everybody)), PEPPERS, TOKEN, FLOWER]


def roles(rules: Traversable = USERS) -> list[str]:
    """Return the users of users.acl, or of sentinels.acl, that have a password."""
    return sorted(set(ROLE.findall(_lines(rules))))


def acl_file(folder: Path, rules: Traversable, settings: Settings) -> str:
    """Return the aclfile for the passwords in a folder, and for the servers that the settings lead to."""
    text = ROLE.sub(lambda match: _hashes(folder, match[1]), _lines(rules))
    text = ON_A_CLUSTER.sub(r" \1" if settings.cluster or settings.state_cluster else "", text)
    text = ON_ONE_SERVER.sub("" if settings.state_cluster else r" \1", text)
    if settings.state_cluster:
        text = KEYS_OF_A_ROLE.sub(_spread, text)
    return text.replace("<ns>", settings.namespace)


def _spread(match: re.Match[str]) -> str:
    """Return a rule's keys as they are on a cluster."""
    return " ".join(f"{match[1]}<ns>:{glob}" for glob in globs_on_a_cluster(match[2]))


def _lines(rules: Traversable) -> str:
    return "".join(f"{user}\n" for user in users(rules.read_text(encoding="utf-8").splitlines()))


def users(lines: Iterable[str]) -> Iterator[str]:
    """Yield one line per user: the server's file knows neither comments nor second lines."""
    user = ""
    for line in lines:
        if line.startswith(" "):
            user += " " + line.strip()
        elif line.startswith("user "):
            if user:
                yield user
            user = line
    yield user


def _hashes(folder: Path, role: str) -> str:
    """Return the hashes of the sent secrets: the text without a final line break."""
    path = folder / _password(role)
    now = [secret_files.read(path)] if os.path.lexists(path) else []
    sent = dict.fromkeys([*now, *_earlier(path)])
    return " ".join(f"#{sha256(text.encode()).hexdigest()}" for text in sent)


def _rotate(folder: Path, name: str) -> None:
    path = folder / name
    if not path.exists():
        return  # it is made in a moment
    old = secret_files.read(path)
    if name == PEPPERS:
        _add_pepper(path, old.split())
        return
    if name not in (TOKEN, FLOWER):  # these are shown by people, who learn the new one
        # Processes may have any of them: whoever rotates twice may have deployed in between, or not.
        secret_files.write(_previous(path), "\n".join(dict.fromkeys([*_earlier(path), old])))
    secret_files.write(path, _new(name))


def _add_pepper(path: Path, ring: list[str]) -> None:
    """Add a pepper last in the ring: every process can read it before any process uses it first."""
    fresh = _new(path.name)
    secret_files.write(path, " ".join([*ring[: RING - 1], fresh]))
    secret_files.write(_next(path), fresh)  # last: what waits to be promoted is in the ring


def _refuse_to_promote(folder: Path, name: str, rotate: Collection[str]) -> None:
    """Raise NothingToPromote where no new value waits, or where this command only makes it."""
    path = folder / name
    if name in rotate:
        raise NothingToPromote(
            f"no process has the new {name} yet: say --rotate {name} alone, deploy, and then --promote {name}"
        )
    if not (path.exists() and _next(path).exists()):
        raise NothingToPromote(f"no new {name} waits: say --rotate {name} and deploy first")


def _promote(folder: Path, name: str) -> None:
    """Put the newest pepper first: new sessions are named with it from then on."""
    path = folder / name
    fresh, ring = secret_files.read(_next(path)), secret_files.read(path).split()
    secret_files.write(path, " ".join([fresh, *(pepper for pepper in ring if pepper != fresh)]))
    _next(path).unlink()


def _forget(folder: Path, name: str) -> None:
    if name == PEPPERS and (folder / name).exists():
        secret_files.write(folder / name, secret_files.read(folder / name).split()[0])
        _next(folder / name).unlink(missing_ok=True)
    _previous(folder / name).unlink(missing_ok=True)


def _new(name: str) -> str:
    if name != FLOWER:
        return secrets.token_hex(BITS // 8)
    # A file of Python, as Flower wants it: the one way to give it a login that is on no command line.
    return (
        f'basic_auth = ["ops:{secrets.token_hex(16)}"]\ncookie_secret = "{secrets.token_hex(32)}"\n'
    )


def _password(role: str) -> str:
    return f"{role}_password"


def _earlier(path: Path) -> list[str]:
    """Return the passwords that were rotated away and not forgotten yet, one a line of their file."""
    earlier = _previous(path)
    return secret_files.read(earlier).splitlines() if os.path.lexists(earlier) else []


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _next(path: Path) -> Path:
    return path.with_name(path.name + ".next")


def _refuse_unknown(given: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(names())):
        hint = did_you_mean(unknown[0], names())
        raise UnknownSecret(
            f"no secret is called {', '.join(unknown)}{hint or '.'} There are {', '.join(names())}"
        )
