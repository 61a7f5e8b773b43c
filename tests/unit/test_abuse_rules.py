"""The built-in rules and the operator's file are checked, and a mistake in it is answered clearly."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom import Rule, Settings, SettingsError
from stillroom.abuse.event import KINDS
from stillroom.abuse.rules import BUILT_IN, kinds_of, read_rules

ASKED_FOR = {
    "hammer",
    "credential_stuffing",
    "password_spraying",
    "scanner",
    "session_guessing",
    "token_replay",
    "ipv6_rotation",
    "creeping_scraper",
}


@pytest.fixture
def write(tmp_path: Path) -> object:
    def write(text: str) -> Path:
        path = tmp_path / "rules.toml"
        path.write_text(text)
        return path

    return write


def named(rules: tuple[Rule, ...]) -> dict[str, Rule]:
    return {rule.name: rule for rule in rules}


def test_the_built_in_rules_are_valid_and_only_say_what_they_would_do() -> None:
    """Each known pattern has a built-in rule, which is valid, only reports, and bans no users."""
    rules = named(read_rules(None))
    assert rules.keys() == BUILT_IN.keys()
    assert rules.keys() >= ASKED_FOR
    assert all(rule.shadow and rule.why for rule in rules.values())
    assert all(rule.action == "log" for rule in rules.values() if rule.group_by == "user")
    assert kinds_of(rules.values()) <= set(KINDS)


def test_a_file_changes_and_adds(write: object) -> None:
    """A built-in rule keeps the fields that the file does not name, and another table is a new rule."""
    path = write(  # type: ignore[operator]
        """
        [rules.scanner]
        shadow = false
        threshold = 40

        [rules.card_testing]
        kinds = ["card_declined"]
        group_by = "ip"
        threshold = 5
        window = 600
        action = "ban"
        ban = 60
        """
    )
    rules = named(read_rules(path))
    built_in = named(read_rules(None))
    assert rules["scanner"] == built_in["scanner"].model_copy(
        update={"shadow": False, "threshold": 40}
    )
    assert rules["hammer"] == built_in["hammer"]
    assert (rules["card_testing"].ban, rules["card_testing"].shadow) == (60, True)
    assert "card_declined" in kinds_of(rules.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[rules.scanner]\nthreshhold = 3",
            "rule scanner: threshhold is not a field; did you mean threshold?",
        ),
        (
            "[rules.scanner]\ngroup_by = 'ipp'",
            "rule scanner: group_by='ipp': Input should be 'ip', 'user' or 'network'; "
            "did you mean ip?",
        ),
        (
            "[rules.scaner]\nshadow = false",
            "rule scaner: threshold is missing, and no built-in rule has this name; "
            "did you mean scanner?",
        ),
        (
            "[rules.scanner]\nthreshold = 0",
            "rule scanner: threshold=0: Input should be greater than or equal to 1",
        ),
        (
            "[rules.scanner]\nkinds = ['Not Found']",
            "rule scanner: kinds.0='Not Found': String should match pattern",
        ),
        (
            "[rules.password_spraying]\naction = 'ban'",
            "rule password_spraying: action='ban' needs group_by='ip' or 'network': "
            "no user is ever banned",
        ),
        (
            "[rules.scanner]\ndistinct = 'ip'",
            "rule scanner: one ip has one ip: distinct='ip' counts to 1",
        ),
        (
            "[rules.scanner]\neach = { not_found = 3 }",
            "rule scanner: each counts the events of one address: it needs distinct='ip'",
        ),
        (
            "[rules.ipv6_rotation]\neach = { 'auth_fial' = 3 }",
            "rule ipv6_rotation: each has auth_fial, which this rule does not count; "
            "did you mean auth_fail?",
        ),
        (
            "[rules.ipv6_rotation]\neach = { 'denied:a b' = 3 }",
            "rule ipv6_rotation: each.denied:a b.[key]='denied:a b': String should match",
        ),
        (
            "[rules.ipv6_rotation]\neach = { denied = 0 }",
            "rule ipv6_rotation: each.denied=0: Input should be greater than or equal to 1",
        ),
        (
            "[rules.creeping_scraper]\ndistinct = 'route'",
            "rule creeping_scraper: consecutive counts windows",
        ),
        ("[rules.'Bad name']\nkinds = ['a']", "rule Bad name: name='Bad name': String should"),
        ("[scanner]\nthreshold = 3", "it may hold tables named [rules.<name>] only"),
        ("rules = 3", "it may hold tables named [rules.<name>] only"),
        ("[rules.scanner", "not TOML"),
    ],
)
def test_a_mistake_names_file_rule_and_field(write: object, text: str, message: str) -> None:
    """A mistake in the file names the file, rule and field, the given value and the allowed or probable one."""
    path = write(text)  # type: ignore[operator]
    with pytest.raises(SettingsError) as caught:
        read_rules(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"STILLROOM_ABUSE_RULES={path}: ")


def test_all_mistakes_are_named_at_once(write: object) -> None:
    """All mistakes of a file are named at once, one a line."""
    path = write("[rules.scanner]\nwindow = 0\nbann = 3\n[rules.hammer]\nn = 0")  # type: ignore[operator]
    with pytest.raises(SettingsError) as caught:
        read_rules(path)
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file raises when the room is made."""
    with pytest.raises(SettingsError, match="No such file"):
        read_rules(tmp_path / "none.toml")


def test_the_settings_of_abuse_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of abuse have limits, and a text in a list that is no network is named."""
    monkeypatch.setenv("STILLROOM_ABUSE_ALLOW", "192.0.2.0/24, 2001:db8::/32")
    assert Settings().abuse_allow == ("192.0.2.0/24", "2001:db8::/32")
    monkeypatch.setenv("STILLROOM_ABUSE_ALLOW", "192.0.2.0/33")
    with pytest.raises(SettingsError, match=r"STILLROOM_ABUSE_ALLOW='192\.0\.2\.0/33'"):
        Settings()
