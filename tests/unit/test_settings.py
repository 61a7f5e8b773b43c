"""Settings: defaults, kind errors, no secrets."""

from __future__ import annotations

import pytest

from stillroom import Settings, SettingsError
from stillroom.settings import redact


def test_the_defaults_are_the_documented_ones() -> None:
    """Nothing set: the address and patience that were asked for."""
    settings = Settings()
    assert settings.redis_url == "redis://redis:6379"
    assert settings.cache_server == settings.broker == settings.redis_url
    assert (settings.connect_attempts, settings.connect_delay) == (5, 5.0)
    assert settings.password is None


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting has its name in the environment."""
    monkeypatch.setenv("REDIS_URL", "rediss://app@state:6380/2")
    monkeypatch.setenv("STILLROOM_CACHE_URL", "redis://cache")
    monkeypatch.setenv("STILLROOM_TTL", "12.5")
    monkeypatch.setenv("STILLROOM_LOADERS", "shop.cache, blog.cache:room")
    settings = Settings()
    assert settings.redis_url == "rediss://app@state:6380/2"
    assert settings.cache_server == "redis://cache"
    assert settings.ttl == 12.5
    assert settings.loaders == ("shop.cache", "blog.cache:room")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("STILLROOM_TLL", "5", "STILLROOM_TLL is not a setting; did you mean STILLROOM_TTL?"),
        ("STILLROOM_XYZZY", "5", "STILLROOM_XYZZY is not a setting"),
        ("STILLROOM_TTL", "soon", "STILLROOM_TTL='soon': Input should be a valid number"),
        ("STILLROOM_TTL", "-1", "STILLROOM_TTL='-1': Input should be greater than 0"),
        (
            "STILLROOM_POOL_SIZE",
            "0",
            "STILLROOM_POOL_SIZE='0': Input should be greater than or equal to 1",
        ),
        ("STILLROOM_NAMESPACE", "a{b", "STILLROOM_NAMESPACE='a{b': String should match"),
        ("REDIS_URL", "http://x", "REDIS_URL='http://x': a Redis URL starts with one of redis://"),
        (
            "REDIS_URL",
            "redis://x?socket_timeout=9",
            "the option 'socket_timeout' does not belong in a URL",
        ),
        ("STILLROOM_LIFE_LIMIT", "10", "ttl + swr is 300 s; life_limit allows 10 s"),
    ],
)
def test_a_mistake_is_answered_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """What was given, what is allowed, what was probably meant."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings()
    assert message in str(caught.value)


def test_an_unknown_argument_is_a_mistake_too() -> None:
    """Keyword arguments are checked as the environment is."""
    with pytest.raises(SettingsError, match=r"tll is not a setting; did you mean ttl\?"):
        Settings(tll=5)


def test_every_mistake_is_named_at_once() -> None:
    """Nobody has to try again to find the second one."""
    with pytest.raises(SettingsError) as caught:
        Settings(ttl=-1, pool_size=0)
    assert "STILLROOM_TTL=-1" in str(caught.value)
    assert "STILLROOM_POOL_SIZE=0" in str(caught.value)


def test_settings_are_frozen() -> None:
    """A setting can't change while services run on it."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().ttl = 5


class TestSecrets:
    """A password comes from the environment or a file, and goes nowhere."""

    def test_it_is_read_from_a_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        """One newline at the end is the editor's, not the password's."""
        path = f"{tmp_path}/secret"
        with open(path, "w", encoding="utf-8") as file:
            file.write("s3cr3t canary\n")
        monkeypatch.setenv("REDIS_PASSWORD_FILE", path)
        assert Settings().password == "s3cr3t canary"

    def test_both_is_a_mistake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which of two would win is nothing to guess about."""
        monkeypatch.setenv("REDIS_PASSWORD", "canary")
        monkeypatch.setenv("REDIS_PASSWORD_FILE", "/nowhere")
        with pytest.raises(
            SettingsError, match="REDIS_PASSWORD and REDIS_PASSWORD_FILE are both set"
        ) as e:
            Settings()
        assert "canary" not in str(e.value)

    def test_a_missing_file_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A secret that was not mounted is an error, not an empty password."""
        monkeypatch.setenv("REDIS_PASSWORD_FILE", "/nowhere")
        with pytest.raises(SettingsError, match="REDIS_PASSWORD_FILE: /nowhere: No such file"):
            Settings()

    def test_it_is_in_no_repr_or_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the setting nor a URL shows its password."""
        monkeypatch.setenv("REDIS_PASSWORD", "canary1")
        monkeypatch.setenv("REDIS_URL", "redis://app:canary2@redis")
        settings = Settings()
        assert "canary" not in repr(settings) + str(settings)
        monkeypatch.setenv("REDIS_URL", "redis://app:canary2@redis?timeout=3")
        with pytest.raises(SettingsError) as caught:
            Settings()
        assert "canary" not in str(caught.value)

    def test_the_broker_gets_it_quoted(self) -> None:
        """A password with special characters is a password in a URL too."""
        settings = Settings(redis_url="redis://redis:6379/1", redis_password="a/b@c:d")
        assert settings.broker == "redis://:a%2Fb%40c%3Ad@redis:6379/1"
        assert redact(settings.broker) == "redis://:***@redis:6379/1"
