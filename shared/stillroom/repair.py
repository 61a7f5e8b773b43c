"""Decide what to send again where the server has lost scripts: it restarted, or was told SCRIPT FLUSH."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.scripts import BY_SHA, Script
from stillroom.wire import Command, refusal, words_of


class Repair:
    """Decide what to send again after a batch met scripts that the server has lost (a restart, SCRIPT FLUSH).

    A batch keeps its order. Where it may be sent twice, everything from its first missing script on is sent again.
    Where it may not, only the missing scripts are sent again, and that is in order only if no other script has run
    behind the first missing one: else the batch is refused, with its missing scripts loaded for the next one. Plain
    commands in a batch that is sent once are counts and events that ride along; they stand for themselves.
    """

    def __init__(
        self, batch: Sequence[Command], refused: RedisRefused, *, may_repeat: bool
    ) -> None:
        self._replies = refused.replies
        self._missing = [n for n, reply in enumerate(self._replies) if _is_noscript(reply)]
        if not self._missing:
            raise refused
        self._batch = batch
        self._words = {place: words_of(batch[place]) for place in self._missing}
        parts = getattr(batch, "parts", ()) or [(len(batch), not may_repeat)]
        self._places: list[int] = []
        first = 0
        for length, is_once in parts:
            self._places += self._sent_again(range(first, first + length), is_once)
            first += length
        self._prepare()

    def _sent_again(self, part: range, is_once: bool) -> list[int]:
        """Return the places of the commands of a part that are sent again."""
        missing = [place for place in self._missing if place in part]
        if not missing:
            return []
        behind = range(missing[0], part.stop)
        if not is_once:
            return list(behind)
        words = {place: words_of(self._batch[place])[0] for place in behind}
        if any(words[place] == b"EVALSHA" for place in behind if place not in missing):
            return []  # another script has run behind it: their order would be lost
        # A WAIT is repeated: the scripts that it waits for are executed only now.
        return sorted([*missing, *(place for place in behind if words[place] == b"WAIT")])

    def _prepare(self) -> None:
        missing = {place: BY_SHA[said[1]].script for place, said in self._words.items()}
        sources = {script.text.source for script in missing.values()}
        self._loads: list[Command] = [(b"SCRIPT", b"LOAD", source) for source in sources]
        again = [self._again(place, missing.get(place)) for place in self._places]
        self.commands = [*self._loads, *again]

    def _again(self, place: int, script: Script | None) -> Command:
        """Build the command again, because a script's digest may have changed: see goes_on."""
        if script is None:
            return self._batch[place]
        return (b"EVALSHA", script.text.sha, *self._words[place][2:])

    def goes_on(self, second: Sequence[Any]) -> bool:
        """Return whether to send `commands`: at first, and again without flags if this server knows no flags."""
        if not second:
            return True
        loaded = second[: len(self._loads)]
        flags_refused = Script.flags_are_known and any(map(_refuses_flags, loaded))
        if flags_refused:
            Script.flags_are_known = False
            self._prepare()
        return flags_refused

    def failed(self, error: RedisUnavailable) -> RedisUnavailable:
        """Return the error of a batch whose second try failed: what was not missing had been done by then."""
        is_partly_done = len(self._missing) < len(self._batch)
        done = is_partly_done or error.may_be_done
        return RedisUnavailable(error.reason, error.detail, may_be_done=done)

    def mended(self, second: Sequence[Any]) -> list[Any]:
        """Return the first replies, with those of the second try in the places that were sent again.

        Raises RedisRefused if one is still an error.
        """
        if any(isinstance(reply, Exception) for reply in second[: len(self._loads)]):
            # This user may not load scripts: say that, not that one is missing.
            raise refusal(second)
        for place, reply in zip(self._places, second[len(self._loads) :], strict=True):
            self._replies[place] = reply
        if any(isinstance(reply, Exception) for reply in self._replies):
            raise refusal(self._replies)
        return self._replies


def _refuses_flags(reply: Any) -> bool:
    """Return whether the server does not know the flags of a script; other errors say nothing about flags.

    Redis 6.2 says `Error compiling script`, newer ones `Unexpected flag in script shebang`.
    """
    said = str(reply) if isinstance(reply, Exception) else ""
    return "Error compiling script" in said or "in script shebang" in said


def _is_noscript(reply: Any) -> bool:
    return isinstance(reply, Exception) and str(reply).startswith("NOSCRIPT")
