"""An exempt client is never denied as banned, however its network is written and whenever it became exempt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom import DEFAULT, BanRefused, Settings, SettingsError, Stillroom
from tests.support.abuse import ban_of, put
from tests.support.limits import forget_denials

Make = Callable[..., Stillroom]
FORMS = {
    "203.0.113.0/24": ["203.0.113.7", "::ffff:203.0.113.7", "64:ff9b::203.0.113.7"],
    "::ffff:203.0.113.0/120": ["203.0.113.7", "::ffff:203.0.113.7", "64:ff9b::203.0.113.7"],
    "64:ff9b::203.0.113.0/120": ["203.0.113.7", "::ffff:203.0.113.7", "64:ff9b::203.0.113.7"],
    "::ffff:203.0.113.7": ["203.0.113.7"],
    "2001:db8:1::/48": ["2001:db8:1:2::3", "2001:db8:1:2::/64", "2001:db8:1::/48"],
    "2001:db8:1:2::3": ["2001:db8:1:2::3", "2001:db8:1:2::99", "2001:db8:1::/48"],
}


@pytest.mark.parametrize(
    ("allowed", "address"), [(a, one) for a, many in FORMS.items() for one in many]
)
def test_an_exemption_holds_for_every_spelling(
    make_room: Make, client: Any, allowed: str, address: str
) -> None:
    """An exemption holds for every spelling of the network and of the address, for operators and for rules."""
    room = make_room(abuse_allow=allowed)
    with pytest.raises(BanRefused, match="STILLROOM_ABUSE_ALLOW"):
        room.abuse.ban(address, 60)
    assert client.keys("*!ban") == []


def test_neighbours_of_the_exempt_are_not(make_room: Make) -> None:
    """The addresses next to an exempt network are not exempt, in each notation."""
    room = make_room(abuse_allow="::ffff:203.0.113.0/120, 2001:db8:1::/48")
    for address in ("203.0.114.7", "::ffff:203.0.112.7", "2001:db8:2::1"):
        assert room.abuse.ban(address, 60)


@pytest.mark.parametrize("name", ["abuse_allow", "trusted_proxies", "health_networks"])
def test_a_network_of_ipv4_in_ipv6_s_notation_is_that_of_ipv4(name: str) -> None:
    """An IPv4 network in IPv6 notation counts as that IPv4 network.

    A text that is no network is refused by name.
    """
    given = Settings(**{name: "::ffff:10.0.0.0/104, 2001:db8::/32"})
    assert getattr(given, name) == ("10.0.0.0/8", "2001:db8::/32")
    with pytest.raises(SettingsError, match=name.upper()):
        Settings(**{name: "::ffff:10.0.0.1/104"})


def test_a_proxy_that_is_named_as_a_mapped_network_is_believed(make_room: Make) -> None:
    """A proxy that is named as an IPv4-mapped network is believed: the address it forwards is the client."""
    room = make_room(trusted_proxies="::ffff:10.0.0.0/104")
    headers = [("X-Forwarded-For", "203.0.113.7")]
    for peer in ("10.0.0.2", "::ffff:10.0.0.2"):
        assert room.limits.client(peer, headers) == "203.0.113.7"


@pytest.mark.parametrize("address", ["203.0.113.9", "2001:db8:1:2::5"])
def test_whoever_became_exempt_is_let_in_and_the_ban_is_lifted(
    make_room: Make, caplog: Any, address: str
) -> None:
    """A banned client that becomes exempt is admitted by restarted processes at once, and the next scan lifts its
    ban.
    """
    before = make_room()
    before.abuse.ban(address, 86_400)
    before.abuse.ban("203.0.113.200", 86_400)
    assert before.limits.check(address, [DEFAULT]).banned
    after = make_room(abuse_allow=f"{address}, 2001:db8:1:2::/64")
    assert after.limits.check(address, [DEFAULT])
    after.abuse.scan()
    assert [ban.subject for ban in after.abuse.bans()] == ["203.0.113.200"]
    forget_denials(before)
    assert before.limits.check(address, [DEFAULT])
    assert "was lifted: it is exempt" in caplog.text


def test_the_bans_of_many_are_compared_page_by_page(
    make_room: Make, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan compares all bans with the exemptions page by page, and does so only now and then."""
    from stillroom.abuse import body

    monkeypatch.setattr(body, "BANS_LISTED", 10)
    room = make_room()
    for n in range(35):
        room.abuse.ban(f"203.0.113.{n}", 1_000 + n)
    other = make_room(abuse_allow="203.0.113.0/28")
    other.abuse.scan()
    assert client.zcard(other.keys.bans) == 35 - 16
    room.abuse.ban("203.0.113.1", 60)
    other.abuse.scan()
    assert client.zcard(other.keys.bans) == 35 - 16 + 1


def test_a_site_that_holds_an_exempt_client_is_not_banned(
    make_room: Make, client: Any, rules: Path
) -> None:
    """A rule reports a site that holds an exempt client, and does not ban its /48."""
    room = make_room(abuse_rules=rules, abuse_allow="2001:db8:1:ffff::/64")
    for n in range(16):
        put(client, room, "denied", ip=f"2001:db8:1:{n:x}::/64")
    room.abuse.scan()
    assert ban_of(client, room, "2001:db8:1::/48") is None
