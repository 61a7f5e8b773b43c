"""What the Sentinels say becomes one view of who is the primary."""

from __future__ import annotations

from itertools import permutations

from stillroom.wire.sentinel import Told, _read, is_outnumbered, view_of

HERE, THERE = ("10.0.0.1", 6379), ("10.0.0.2", 6379)


def told(address: tuple[str, int], epoch: int = 1) -> Told:
    return Told(address, is_well=True, epoch=epoch, quorum=2, in_office_until=9.0)


def test_one_sentinel_that_names_another_server_is_outvoted() -> None:
    """Of configurations that are as new, the one that most Sentinels have is right, whoever answers first."""
    for answers in permutations([told(THERE), told(HERE), told(HERE)]):
        assert view_of(answers, 3) == (HERE, 9.0)


def test_a_newer_configuration_names_the_primary_and_is_not_believed_alone() -> None:
    """After a failover one Sentinel knows it first. The former primary is not believed any more."""
    for answers in permutations([told(THERE, 2), told(HERE), told(HERE)]):
        assert view_of(answers, 3) == (THERE, 0.0)


def test_a_newer_configuration_is_outnumbered_by_those_who_call_another_server_well() -> None:
    """As many Sentinels that call another server well are enough to doubt it."""
    gone = told(HERE)._replace(is_well=False)
    newer = told(THERE, 2)
    assert is_outnumbered([newer, told(HERE), told(HERE)], THERE)
    assert is_outnumbered([newer, told(HERE)], THERE)
    assert not is_outnumbered([newer, newer, told(HERE)], THERE)
    assert not is_outnumbered([newer, gone, gone], THERE)
    assert not is_outnumbered([newer], THERE)


def test_a_sentinel_in_the_middle_of_a_failover_has_the_newer_configuration() -> None:
    """It names the new primary, and describes the old one with the old epoch: that is no vote for the old one."""
    fields = {"ip": HERE[0], "port": "6379", "flags": "master,failover_in_progress"}
    fields |= {"last-ok-ping-reply": "5", "down-after-milliseconds": "1000"}
    fields |= {"config-epoch": "1", "quorum": "2"}
    about = [text.encode() for pair in fields.items() for text in pair]
    leader = _read([b"10.0.0.2", b"6379"], about, 0.0, 0.1)
    assert leader.epoch == 2
    for answers in permutations([leader, told(HERE), told(HERE)]):
        assert view_of(answers, 3) == (THERE, 0.0)
