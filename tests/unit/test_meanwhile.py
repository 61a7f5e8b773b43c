"""What a process remembers of limits stays right, whatever another thread learns in the middle of a call."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from stillroom import Limit, Settings
from stillroom.keys import Keys
from stillroom.known_bans import KnownBans
from stillroom.limits.changes import Change, Changes
from stillroom.limits.decision import TOO_MANY, Decision
from stillroom.limits.denials import Denial, Denials
from stillroom.limits.request import Requests
from stillroom.stats import Stats

API = Limit("api", 5, 60)
US = 1_000_000


def reply(quota: int) -> list[bytes]:
    """Return what Redis holds of a change to this quota."""
    return [b"api", b'{"quota": %d, "window": 60, "until": 9}' % quota]


def test_a_change_holds_that_is_learned_while_a_limit_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A change that another thread learns while a check looks its limits up holds from the next check on."""
    changes, onto = Changes(), Change.onto
    changes.learn(reply(10), 5.0, 0.0)

    def learned_meanwhile(change: Change, limit: Limit) -> Limit:
        if change.quota == 10:
            changes.learn(reply(20), 5.0, 0.0)
        return onto(change, limit)

    monkeypatch.setattr(Change, "onto", learned_meanwhile)
    changes.applied((API,), 1.0)
    assert changes.applied((API,), 1.0) == (Limit("api", 20, 60),)


@pytest.fixture
def requests() -> Requests:
    settings = Settings(session_peppers="p" * 32)
    keys = Keys(settings.namespace)
    return Requests(settings, keys, Stats(keys))


def test_a_request_is_not_kept_with_a_window_that_was_too_short(
    requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer window of a limit's name that another thread learns while a request is made is in the next one."""
    logs = Requests._logs

    def learned_meanwhile(self: Requests, *args: Any) -> Any:
        self.learn_windows(["api"], [b"%d" % (600 * US)])
        return logs(self, *args)

    monkeypatch.setattr(Requests, "_logs", learned_meanwhile)
    requests.make("203.0.113.7", [API], 1, "")
    assert requests.make("203.0.113.7", [API], 1, "").plan.numbers[2] == b"601000"


def test_a_request_is_not_kept_without_a_width_of_bans(
    requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A width of banned networks that another thread learns while a request is made is in the next one."""
    logs = Requests._logs

    def learned_meanwhile(self: Requests, *args: Any) -> Any:
        self.learn_widths(b"4/24 ", b"")
        return logs(self, *args)

    monkeypatch.setattr(Requests, "_logs", learned_meanwhile)
    requests.make("203.0.113.7", [API], 1, "")
    assert any(b"203.0.113.0/24" in key for key in requests.make("203.0.113.7", [API], 1, "").bans)


class Taken(OrderedDict[bytes, Denial]):
    """Denials of which another thread takes each one that is looked at."""

    def get(self, key: bytes, default: Any = None) -> Any:
        found = super().get(key, default)
        self.pop(key, None)
        return found


def test_a_denial_that_another_thread_takes_fails_no_check() -> None:
    """A denial that another check takes while the counts are written down raises no error in this one."""
    denials, decision = Denials(10), Decision((API,), TOO_MANY, 1, 0)

    class Asked:
        keys = (b"log",)

    denials.found = Taken()
    denials.add(b"log", Denial(decision, Asked(), API, 0.0, 1.0, []))
    assert denials.take_over(2.0, 100) == []


def test_a_new_width_of_bans_disturbs_nobody_who_looks_through_them() -> None:
    """A ban of a new width is learned while another thread goes through the widths that are known."""
    bans = KnownBans(lambda: None)
    bans.learn(b"ns:{rl:ip:203.0.113.0/24}:!ban", 5_000)
    widths = iter(bans.widths)
    bans.learn(b"ns:{rl:ip:198.51.0.0/16}:!ban", 5_000)
    assert list(widths) == ["4/24"]
    assert bans.widths == {"4/16", "4/24"}
