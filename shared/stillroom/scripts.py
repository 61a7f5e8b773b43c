"""Loads lua/*.lua once. A script is sent by its digest; operation.py sends the text where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files

_FOLDER = files("stillroom") / "lua"
_INCLUDE = "-- include: "


class Script:
    """One lua/*.lua file: one act on Redis."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = _with_includes((_FOLDER / f"{name}.lua").read_text(encoding="utf-8"))
        # The digest names the script to EVALSHA; it protects nothing.
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest().encode()
        BY_SHA[self.sha] = self

    def __call__(self, keys: Sequence[bytes], *args: bytes | str | int) -> tuple[bytes | str, ...]:
        """The command that runs this script."""
        texts = [b"%d" % arg if isinstance(arg, int) else arg for arg in args]
        return (b"EVALSHA", self.sha, b"%d" % len(keys), *keys, *texts)


BY_SHA: dict[bytes | str, Script] = {}


def _with_includes(text: str) -> str:
    """The script with the lua/lib files named in its header in front."""
    names = [
        name
        for line in text.splitlines()
        if line.startswith(_INCLUDE)
        for name in line.removeprefix(_INCLUDE).split()
    ]
    libraries = [(_FOLDER / "lib" / f"{name}.lua").read_text(encoding="utf-8") for name in names]
    return "\n".join([*libraries, text])


back_off = Script("back_off")
claim_refresh = Script("claim_refresh")
clear = Script("clear")
commit = Script("commit")
lease_load = Script("lease_load")
lease_refresh = Script("lease_refresh")
mark = Script("mark")
put = Script("put")
release = Script("release")
session_create = Script("session_create")
session_destroy = Script("session_destroy")
session_end = Script("session_end")
session_get = Script("session_get")
session_list = Script("session_list")
session_reclaim = Script("session_reclaim")
session_revoke = Script("session_revoke")
session_rotate = Script("session_rotate")
session_sweep = Script("session_sweep")
session_touch = Script("session_touch")
session_update = Script("session_update")
trim_marks = Script("trim_marks")
