"""A client cannot get a bucket of its own by what it writes into a header."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import Settings, SettingsError
from stillroom.limits.identity import CROWD, Clients, Crowd, forwarded_for
from stillroom.subject import UNKNOWN, hidden, is_private, parse_address, site_of, subject_of
from tests.support.steps import steps_of

PROXY, IP = "10.0.0.2", "203.0.113.7"
XFF = "X-Forwarded-For"


def clients(**changes: Any) -> Clients:
    return Clients(Settings(**{"trusted_proxies": "10.0.0.0/8, 2001:db8:ffff::/48"} | changes))


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        (IP, IP),
        (f"{IP}:8080", IP),
        (f" {IP} ", IP),
        (f'"{IP}:80"', IP),
        (f"::ffff:{IP}", IP),
        (f"[::ffff:{IP}]:443", IP),
        ("64:ff9b::cb00:7107", IP),
        ("2002:cb00:7107::1", "2002:cb00:7107::/64"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::/64", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("[fe80::1%25eth0]:80", "fe80::/64"),
        ("::1", "::/64"),
        ("", UNKNOWN),
        ("unknown", UNKNOWN),
        ("_hidden", UNKNOWN),
        ("localhost", UNKNOWN),
        ("010.0.0.1", UNKNOWN),
        ("1.2.3", UNKNOWN),
        ("1.2.3.4.5", UNKNOWN),
        ("0x7f.1", UNKNOWN),
        ("2130706433", UNKNOWN),
        ("::ffff:1.2.3.4.5", UNKNOWN),
        ("1.2.3.4\r\nX: y", UNKNOWN),
        ("١.2.3.4", UNKNOWN),
        ("9" * 10_000, UNKNOWN),
        ("[" * 50, UNKNOWN),
    ],
)
def test_an_address_has_one_subject(text: str, subject: str) -> None:
    """An address has one subject in every spelling, and all junk shares one."""
    assert subject_of(text) == subject
    assert subject_of(subject) == subject


@given(st.text(max_size=200))
def test_any_text_has_a_subject(text: str) -> None:
    """Any text has a subject: an address, a network or `unknown`, without a character that leaves its key."""
    subject = subject_of(text)
    assert subject == UNKNOWN or parse_address(subject.partition("/")[0]) is not None
    assert not set(subject) & set("{}%!& \n")


def test_a_household_has_one_network() -> None:
    """A household has one network of as many bits as the setting says, inside a /48 site."""
    assert subject_of("2001:db8:1:2ff::1", 56) == "2001:db8:1:200::/56"
    assert site_of("2001:db8:1:2::/64") == "2001:db8:1::/48"
    assert (site_of(IP), site_of(UNKNOWN)) == (None, None)


@pytest.mark.parametrize(
    ("tunnel", "client"),
    [("2002:a00:1::5", "2002:a00:1::/64"), ("64:ff9b::a00:1", "10.0.0.1")],
)
def test_a_tunnel_to_a_proxys_address_is_no_proxy(tunnel: str, client: str) -> None:
    """A tunnel to a proxy's address is not believed as that proxy, as a peer or in the chain."""
    victim = [("X-Forwarded-For", "198.51.100.7")]
    assert clients().subject(tunnel, victim) == client
    chain = [("X-Forwarded-For", f"198.51.100.7, {tunnel}")]
    assert clients().subject("10.0.0.2", chain) == client
    assert clients().subject("::ffff:10.0.0.1", victim) == "198.51.100.7"


def test_without_trusted_proxies_the_peer_is_the_client() -> None:
    """Without trusted proxies the peer is the client, whatever the headers say."""
    spoofed = [(XFF, "198.51.100.1"), ("Forwarded", "for=198.51.100.1"), ("X-Real-IP", "1.1.1.1")]
    assert clients(trusted_proxies=()).subject(IP, spoofed) == IP
    assert clients().subject(IP, spoofed) == IP
    assert clients(trusted_proxies=()).subject(None, spoofed) == UNKNOWN


@pytest.mark.parametrize(
    ("values", "subject"),
    [
        ([IP], IP),
        ([f"198.51.100.1, {IP}"], IP),
        ([f"198.51.100.1, {IP}, 10.9.9.9"], IP),
        (["198.51.100.1", f"{IP}, 10.0.0.3"], IP),
        (["198.51.100.1", IP], IP),
        ([f"junk, , {IP}"], IP),
        ([f"{IP}:4711"], IP),
        (["[2001:db8:1:2::9]:80"], "2001:db8:1:2::/64"),
        ([f"::ffff:{IP}, ::ffff:10.0.0.9"], IP),
        ([f"{IP}, 2001:db8:ffff::7"], IP),
        ([f"{IP}, junk"], UNKNOWN),
        ([f"{IP},"], UNKNOWN),
        ([""], UNKNOWN),
        ([], PROXY),
        (["10.0.0.7"], "10.0.0.7"),
        (["10.0.0.7, 10.0.0.8"], "10.0.0.7"),
        ([", ".join(["1.1.1.1"] * 99 + [IP])], IP),
        ([", ".join([IP] + ["10.0.0.1"] * 100)], UNKNOWN),
        (["1.1.1.1, " * 10_000 + IP], IP),
    ],
)
def test_the_header_is_walked_from_the_right(values: list[str], subject: str) -> None:
    """X-Forwarded-For is read from the right past trusted proxies to the address the last of them heard from."""
    headers = [("Host", "x"), *[("x-forwarded-FOR", value) for value in values]]
    assert clients().subject(PROXY, headers) == subject
    raw = [(name.encode(), value.encode()) for name, value in headers]
    assert clients().subject(f"{PROXY}:33000", raw) == subject


@pytest.mark.parametrize(
    ("values", "subject"),
    [
        ([f"for={IP}"], IP),
        ([f'for="{IP}:4711";proto=https;by=10.0.0.2'], IP),
        ([f"proto=https;FOR={IP}, for=10.0.0.3"], IP),
        (['for="[2001:db8:1:2::9]:47"'], "2001:db8:1:2::/64"),
        (["for=198.51.100.1", f"for={IP}"], IP),
        ([f'for="198.51.100.1, for={IP}'], IP),
        (["for=unknown"], UNKNOWN),
        (["for=_secret"], UNKNOWN),
        (["proto=https"], UNKNOWN),
        ([f'proto=http;host="x;for=198.51.100.1";for={IP}'], IP),
        ([f'proto=http;host="x, for=198.51.100.1";for={IP}'], IP),
        ([f'host="a\\\\";for={IP}'], IP),
        ([f'host="a\\";for=198.51.100.1;b=\\"";for={IP}'], IP),
        ([f'host="x";for=198.51.100.1;y="";for={IP}'], UNKNOWN),
        ([f'host="x", for=198.51.100.1;y="";for={IP}'], UNKNOWN),
        ([f'for={IP};host="for=198.51.100.1"'], IP),
        ([f'for="198.51.100.1, for="{IP}"'], IP),
        ([f'for=198.51.100.1", for={IP}'], IP),
        ([f'by="x" , FOR = "{IP}:80" ;proto=https'], IP),
        (['for="198.51.100.1'], UNKNOWN),
        ([f'for=198.51.100.1"; for={IP}, for="10.0.0.3'], UNKNOWN),
        (['\\"' * 10_000], UNKNOWN),
        ([f"for={IP}," + ' for=10.0.0.3;h="\\"",' * 30 + "for=10.0.0.4"], IP),
    ],
)
def test_forwarded_is_walked_too_where_the_settings_say_so(values: list[str], subject: str) -> None:
    """Forwarded (RFC 7239) is read the same way where the setting says so, and an open quote hides nothing."""
    headers = [(XFF, "198.51.100.99"), *[("Forwarded", value) for value in values]]
    assert clients(proxy_header="forwarded").subject(PROXY, headers) == subject
    assert clients().subject(PROXY, headers) == "198.51.100.99"


@pytest.mark.parametrize("header", ["cf-connecting-ip", "x-real-ip"])
@pytest.mark.parametrize(
    ("values", "subject"),
    [
        ([IP], IP),
        ([f"{IP}:80"], IP),
        (["2001:db8:1:2::9"], "2001:db8:1:2::/64"),
        ([], PROXY),
        ([IP, "198.51.100.1"], UNKNOWN),
        ([f"198.51.100.1, {IP}"], UNKNOWN),
        (["junk"], UNKNOWN),
        ([""], UNKNOWN),
    ],
)
def test_a_header_of_one_address_is_believed_from_a_proxy(
    header: str, values: list[str], subject: str
) -> None:
    """A header of one address is believed from a proxy only, and only if it holds one."""
    headers = [(XFF, "198.51.100.99"), *[(header.title(), value) for value in values]]
    assert clients(proxy_header=header).subject(PROXY, headers) == subject
    assert clients(proxy_header=header).subject(IP, headers) == IP
    assert clients().subject(PROXY, headers) == "198.51.100.99"


def test_the_networks_of_a_public_proxy_have_a_name() -> None:
    """`cloudflare` stands for its published networks, and an unknown name raises."""
    trusting = clients(trusted_proxies="cloudflare, 10.0.0.0/8", proxy_header="cf-connecting-ip")
    named = [("CF-Connecting-IP", IP)]
    assert trusting.subject("172.68.1.1", named) == IP
    assert trusting.subject("2606:4700::1", named) == IP
    assert trusting.subject(PROXY, named) == IP
    assert trusting.subject("198.51.100.7", named) == "198.51.100.7"
    with pytest.raises(SettingsError, match=r"did you mean cloudflare\?"):
        clients(trusted_proxies="cloudflair")


def test_reading_forwarded_takes_time_by_its_length() -> None:
    """Reading Forwarded takes time linear in its length, with unclosed quotes too."""
    few, many = (
        steps_of(lambda n=n: list(forwarded_for('\\"' * n + ';"' * n))) for n in (1_000, 4_000)
    )
    assert many <= 5 * few


def test_a_proxy_may_come_through_a_socket_file() -> None:
    """A proxy behind a socket file has no peer; `unix` among the proxies makes it believed."""
    headers = [(XFF, IP)]
    assert clients(trusted_proxies="unix").subject("", headers) == IP
    assert clients(trusted_proxies="unix").subject(None, []) == UNKNOWN
    assert clients().subject("", headers) == UNKNOWN


@pytest.mark.parametrize("peer", ["localhost", "<local>", "unix", "0.0.0.0"])
def test_a_server_may_have_a_word_for_a_socket_file(peer: str) -> None:
    """Where waitress, Werkzeug, eventlet and uWSGI listen on a socket file, their word for the peer means one."""
    headers = [(XFF, IP)]
    assert clients(trusted_proxies="unix").subject(peer, headers) == IP
    assert clients(trusted_proxies="10.0.0.0/8").subject(peer, headers) == UNKNOWN
    assert clients(trusted_proxies="unix").subject("name.example", headers) == UNKNOWN


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "proxy", "10.0.0.0-10.0.0.9"])
def test_a_network_is_checked(network: str) -> None:
    """A network setting that is none is refused with what is allowed."""
    with pytest.raises(SettingsError, match="a network is written as"):
        clients(trusted_proxies=network)


def test_names_are_the_same_however_they_are_typed() -> None:
    """A name has one HMAC however it is typed (NFKC, case, spaces), and another for each kind and pepper."""
    pepper = b"p" * 32
    name = hidden("user", "Straße", pepper)
    assert len(name) == 22
    assert {hidden("user", text, pepper) for text in (" STRASSE ", "strasse", "ｓtraße")} == {name}
    others = {
        hidden("key", "Straße", pepper),
        hidden("user", "Straße", b"q" * 32),
        hidden("user", "", pepper),
    }
    assert len(others | {name}) == 4
    assert len(hidden("user", "\ud800" + "x" * 10**6, pepper)) == 22


def test_a_crowd_from_one_private_address_is_noticed() -> None:
    """A private address with over nine in ten of a thousand requests is reported, whatever came before."""
    for share, noticed in ((1.0, True), (0.95, True), (0.8, False)):
        crowd, seen = Crowd(), set()
        for n in range(3 * CROWD):
            one = n >= CROWD and n % 100 < share * 100
            client = "10.0.0.2" if one else f"192.168.1.{n % 200}" if n % 2 else "203.0.113.9"
            if is_private(client) and crowd.saw(client, n):
                seen.add(client)
        assert seen == ({"10.0.0.2"} if noticed else set())


def test_private_is_what_is_inside_a_network() -> None:
    """Private addresses are those inside a network: not this machine and not public ones."""
    assert all(
        map(is_private, ("10.1.1.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd00::/64"))
    )
    assert not any(map(is_private, ("127.0.0.1", "::/64", IP, "2001:db8::/64", UNKNOWN)))
