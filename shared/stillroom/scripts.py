"""Loads lua/*.lua once. A script is sent by its digest; repair.py sends the text where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files

_FOLDER = files("stillroom") / "lua"
_INCLUDE = "-- include: "
_FLAGS = "-- flags: "
# A server that is full, and too old to know flags, refuses a script's first write if it takes memory, and only the
# first. This one takes none: no hash has such a field, and where the key is no hash it is a write all the same.
_FIRST_WRITE = "redis.pcall('HDEL', KEYS[1], '')\n"


class Script:
    """One lua/*.lua file: one act on Redis.

    One that says `-- flags: allow-oom` works on a server that is full. It has two texts: Redis 7 and newer read the
    flags, an older server refuses a text that has any, and is sent the other one from then on.
    """

    flags_are_known = True  # by every server this process has met

    def __init__(self, name: str) -> None:
        self.name = name
        text = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
        flags = [line.removeprefix(_FLAGS) for line in text.splitlines() if line.startswith(_FLAGS)]
        source = _with_includes(text)
        self.plain = Text(self, _FIRST_WRITE + source if flags else source)
        self.flagged = Text(self, f"#!lua flags={flags[0]}\n{source}") if flags else None

    @property
    def text(self) -> Text:
        """Return the text to send."""
        return self.flagged if self.flagged and Script.flags_are_known else self.plain

    def __call__(self, keys: Sequence[bytes], *args: bytes | str | int) -> tuple[bytes | str, ...]:
        """Return the command that runs this script."""
        if {*map(type, args)} != _BYTES:
            args = tuple([b"%d" % arg if isinstance(arg, int) else arg for arg in args])
        return (b"EVALSHA", self.text.sha, b"%d" % len(keys), *keys, *args)  # type: ignore[arg-type]

    def run(self, words: tuple[bytes | str, ...]) -> tuple[bytes | str, ...]:
        """Return the command that runs this script, from the words that EVALSHA takes after the digest."""
        return (b"EVALSHA", self.text.sha, *words)


class Text:
    """Hold the text of a script as it is sent, and its digest, by which it is run."""

    def __init__(self, script: Script, source: str) -> None:
        self.script = script
        self.source = source
        # The digest names the script to EVALSHA; it protects nothing.
        self.sha = sha1(source.encode(), usedforsecurity=False).hexdigest().encode()
        BY_SHA[self.sha] = self


BY_SHA: dict[bytes | str, Text] = {}
_BYTES = {bytes}


def _with_includes(text: str, known: set[str] | None = None) -> str:
    """Return the script with each lua/lib file that it names in place of the line that names it.

    Redis makes the functions of a script anew each time it runs, so what is rarely needed is included where it is.
    """
    known = set() if known is None else known
    lines: list[str] = []
    for line in text.splitlines():
        if not line.lstrip().startswith(_INCLUDE):
            lines.append(line)
            continue
        for name in line.partition(_INCLUDE)[2].split():
            if name not in known:
                known.add(name)
                library = (_FOLDER / "lib" / f"{name}.lua").read_text(encoding="utf-8")
                lines.append(_with_includes(library, known))
    return "\n".join(lines)


abuse_count = Script("abuse_count")
abuse_judge = Script("abuse_judge")
abuse_lift = Script("abuse_lift")
abuse_tidy = Script("abuse_tidy")
add = Script("add")
agree = Script("agree")
back_off = Script("back_off")
ban = Script("ban")
ban_end = Script("ban_end")
ban_spread = Script("ban_spread")
claim_refresh = Script("claim_refresh")
clear = Script("clear")
commit = Script("commit")
dead_letter = Script("dead_letter")
drop = Script("drop")
drop_globs = Script("drop_globs")
fail_load = Script("fail_load")
finish_order = Script("finish_order")
finish_todo = Script("finish_todo")
fold_counts = Script("fold_counts")
forget = Script("forget")
health_snapshot = Script("health_snapshot")
lease_load = Script("lease_load")
lease_refresh = Script("lease_refresh")
limit_change = Script("limit_change")
limit_charge = Script("limit_charge")
limit_check = Script("limit_check")
limit_settle = Script("limit_settle")
limit_windows = Script("limit_windows")
mark = Script("mark")
near_join = Script("near_join")
put = Script("put")
reclaim_tag = Script("reclaim_tag")
rehearse = Script("rehearse")
release = Script("release")
replace = Script("replace")
session_create = Script("session_create")
session_destroy = Script("session_destroy")
session_end = Script("session_end")
session_end_all = Script("session_end_all")
session_free = Script("session_free")
session_get = Script("session_get")
session_hold = Script("session_hold")
session_list = Script("session_list")
session_reclaim = Script("session_reclaim")
session_revoke = Script("session_revoke")
session_rotate = Script("session_rotate")
session_shut = Script("session_shut")
session_arrive = Script("session_arrive")
session_sweep = Script("session_sweep")
session_touch = Script("session_touch")
session_undo = Script("session_undo")
session_update = Script("session_update")
take_place = Script("take_place")
slot_renew = Script("slot_renew")
slot_take = Script("slot_take")
take_order = Script("take_order")
take_todo = Script("take_todo")
task_ticked = Script("task_ticked")
trim_index = Script("trim_index")
trim_marks = Script("trim_marks")
verify_epoch = Script("verify_epoch")
warm_claim = Script("warm_claim")
webhook_lease = Script("webhook_lease")
webhook_note = Script("webhook_note")
worker_seen = Script("worker_seen")
write_orders = Script("write_orders")
