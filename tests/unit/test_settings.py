"""Settings have their defaults, kind errors, and no visible secrets."""

from __future__ import annotations

import os
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import AmqpDsn, BaseModel, HttpUrl, RedisDsn, SecretStr

from stillroom import NoDispatch, Settings, SettingsError, Stillroom, StillroomError
from stillroom.environment import SECRETS
from stillroom.settings import environment_names
from stillroom.urls import redact


def test_the_defaults_are_the_documented_ones() -> None:
    """Without any setting the documented address and deadlines hold."""
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
        ("STILLROOM_REDIS_URL", "redis://x", "is not a setting; did you mean REDIS_URL?"),
        ("STILLROOM_REDIS_PASSWORD", "x", "is not a setting; did you mean REDIS_PASSWORD?"),
        ("STILLROOM_PEPPERS", "x", "is not a setting; did you mean STILLROOM_SESSION_PEPPERS?"),
        (
            "STILLROOM_TTL",
            "5m",
            "STILLROOM_TTL='5m': a number of seconds, or a timedelta; did you mean 300?",
        ),
        ("STILLROOM_TTL", "soon", "STILLROOM_TTL='soon': a number of seconds, or a timedelta"),
        (
            "STILLROOM_SWR",
            "1000000",
            "STILLROOM_TTL + STILLROOM_SWR is 1,000,300 s; STILLROOM_LIFE_LIMIT allows 604,800 s",
        ),
        ("STILLROOM_POOL_SIZE", "many", "STILLROOM_POOL_SIZE='many': a whole number"),
        ("STILLROOM_POOL_SIZE", "1.5", "STILLROOM_POOL_SIZE='1.5': a whole number"),
        ("STILLROOM_JITTER", "some", "STILLROOM_JITTER='some': a number"),
        ("STILLROOM_OTEL", "on please", "STILLROOM_OTEL='on please': 0 or 1"),
        ("STILLROOM_HOST", "x", "STILLROOM_HOST is not a setting; did you mean REDIS_URL?"),
        ("STILLROOM_KEY_PREFIX", "x", "is not a setting; did you mean STILLROOM_NAMESPACE?"),
        (
            "STILLROOM_TTL",
            "-1",
            "STILLROOM_TTL='-1': Input should be greater than or equal to 0.001",
        ),
        (
            "STILLROOM_POOL_SIZE",
            "0",
            "STILLROOM_POOL_SIZE='0': Input should be greater than or equal to 1",
        ),
        ("STILLROOM_NAMESPACE", "a{b", "STILLROOM_NAMESPACE='a{b': 1 to 64 letters, digits"),
        ("REDIS_URL", "http://x", "REDIS_URL='http://x': a Redis URL starts with one of redis://"),
        ("REDIS_URL", "unix://run/redis.sock", "begins after three slashes"),
        ("STILLROOM_CACHE_URL", "unix://?db=1", "begins after three slashes"),
        (
            "REDIS_URL",
            "redis://x?socket_timeout=9",
            "the option 'socket_timeout' does not belong in a URL",
        ),
        (
            "REDIS_URL",
            "rediss://x?ssl_cacert=/ca.pem",
            "a Redis URL has no option 'ssl_cacert'; did you mean 'ssl_ca_certs'",
        ),
        ("REDIS_URL", "redis://x/\u00b2", "'\u00b2' is no database: databases are numbers"),
        ("REDIS_URL", "redis://x?fnord=1", "no option 'fnord'; there are db, username, password"),
        (
            "REDIS_URL",
            "redis://x?health_check_interval=9",
            "a Redis URL has no option 'health_check_interval'; there are db",
        ),
        (
            "REDIS_URL",
            "redis+sentinel://x/main?ssl_ca_certs=/ca.pem",
            "the option 'ssl_ca_certs' is for TLS: the URL starts with rediss then",
        ),
        (
            "STILLROOM_CACHE_URL",
            "rediss://x?ssl_cert_reqs=maybe",
            "ssl_cert_reqs='maybe': none, optional or required",
        ),
        (
            "STILLROOM_BROKER_URL",
            "rediss://x?ssl_cert_reqs=maybe",
            "ssl_cert_reqs='maybe': none, optional or required",
        ),
        (
            "REDIS_URL",
            "rediss://x?ssl_keyfile=/key.pem",
            "ssl_keyfile is the key of a certificate: name that with ssl_certfile",
        ),
        (
            "REDIS_URL",
            "rediss://x?ssl_min_version=TLSv1_2",
            "ssl_min_version='TLSv1_2': 771 for TLS 1.2, or 772 for TLS 1.3",
        ),
        (
            "REDIS_URL",
            "rediss+sentinel://x/main?ssl_include_verify_flags=STRICT",
            "ssl_include_verify_flags: 'STRICT' is no flag of Python's ssl",
        ),
        (
            "REDIS_URL",
            "redis://:hun#canary@x",
            "REDIS_URL='redis://:***@x': it can't be read; # ? / [ ] in a password",
        ),
        ("REDIS_URL", "redis://:hun/canary@x", "REDIS_URL='redis://:***@x': it can't be read"),
        (
            "REDIS_URL",
            "redis://:1/canary@x",
            "REDIS_URL='redis://:***@x': its password holds a # ? or /",
        ),
        ("REDIS_URL", "redis://:[canary@x", "it can't be read; # ? / [ ] in a password"),
        ("REDIS_URL", "redis://:canary@x:port", "it can't be read"),
        ("REDIS_URL", "redis://x?password=canary#canary", "its password holds a # ? or /"),
        ("REDIS_URL", "redis://x?password=hun&canary", "and & in a password as %26"),
        ("REDIS_URL", "redis+sentinel://u:canary?hun@x/main", "its password holds a # ? or /"),
        ("REDIS_URL", "redis://x:99999", "and a port is a number up to 65,535"),
        ("REDIS_URL", ":canary@redis", "REDIS_URL=':***@redis': a Redis URL starts with"),
        ("STILLROOM_WEBHOOK_URL", "https://u:[canary]@x/", "=***: a webhook's address"),
        ("STILLROOM_WEBHOOK_URL", "https://u:canary℀@x/", "=***: in a webhook's address a space"),
        ("REDIS_URL", '"redis://:canary@x"', "; leave out the quotes around it"),
        ("STILLROOM_TTL", "'5'", "a number of seconds, or a timedelta; leave out the quotes"),
        (
            "STILLROOM_LIFE_LIMIT",
            "10",
            "STILLROOM_TTL + STILLROOM_SWR is 300 s; STILLROOM_LIFE_LIMIT allows 10 s",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """A mistake is answered with the given value, the allowed ones and the probable one."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings()
    assert message in str(caught.value)
    assert "canary" not in str(caught.value)


def test_what_kubernetes_injects_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that Kubernetes injects for a Service called stillroom is ignored."""
    monkeypatch.setenv("STILLROOM_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("STILLROOM_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("STILLROOM_PORT_80_TCP_ADDR", "10.0.0.1")
    assert Settings().namespace == "stillroom"


def test_what_a_stack_is_deployed_with_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that `stack.yml` takes from the shell is no setting, and a slip of a setting's name stays one."""
    monkeypatch.setenv("STILLROOM_IMAGE", "registry.example/shop:7")
    assert Settings().namespace == "stillroom"
    monkeypatch.setenv("STILLROOM_IMAGE_ROTO", "/images")
    with pytest.raises(SettingsError, match="did you mean STILLROOM_IMAGE_ROOT"):
        Settings()


def test_an_unknown_argument_is_a_mistake_too() -> None:
    """An unknown keyword argument is refused as in the environment."""
    with pytest.raises(SettingsError, match=r"tll is not a setting; did you mean ttl\?"):
        Settings(tll=5)


@pytest.mark.parametrize(
    "name",
    [
        *("ttl", "lease", "refresh_lease", "backoff", "backoff_limit"),
        *("session_idle", "session_absolute", "session_device_memory"),
    ],
)
def test_what_redis_keeps_lasts_a_millisecond_at_least(name: str) -> None:
    """A lifetime below a millisecond, which each call would refuse, is refused where it is set."""
    with pytest.raises(SettingsError, match=f"{name.upper()}=1e-06: .* 0.001"):
        Settings(**{name: 1e-6})


def test_every_mistake_is_named_at_once() -> None:
    """Every mistake is named at once."""
    with pytest.raises(SettingsError) as caught:
        Settings(ttl=-1, pool_size=0)
    assert "STILLROOM_TTL=-1" in str(caught.value)
    assert "STILLROOM_POOL_SIZE=0" in str(caught.value)


def test_settings_are_frozen() -> None:
    """A setting cannot change while services run on it."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().ttl = 5


class TestSecrets:
    """A password comes from the environment or a file and is shown nowhere."""

    def test_it_is_read_from_a_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        """A secret is read from a file without one final newline."""
        path = f"{tmp_path}/secret"
        with open(path, "w", encoding="utf-8") as file:
            file.write("s3cr3t canary\n")
        monkeypatch.setenv("REDIS_PASSWORD_FILE", path)
        assert Settings().password == "s3cr3t canary"

    def test_both_is_a_mistake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A secret given as variable and as file is refused."""
        monkeypatch.setenv("REDIS_PASSWORD", "canary")
        monkeypatch.setenv("REDIS_PASSWORD_FILE", "/nowhere")
        with pytest.raises(
            SettingsError, match="REDIS_PASSWORD and REDIS_PASSWORD_FILE are both set"
        ) as e:
            Settings()
        assert "canary" not in str(e.value)

    def test_a_missing_file_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A missing secret file raises with its name, and is no empty password."""
        monkeypatch.setenv("REDIS_PASSWORD_FILE", "/nowhere")
        with pytest.raises(SettingsError, match="REDIS_PASSWORD_FILE: /nowhere: No such file"):
            Settings()

    def test_it_is_in_no_repr_or_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the setting nor a URL shows its password in a repr or an error."""
        monkeypatch.setenv("REDIS_PASSWORD", "canary1")
        monkeypatch.setenv("REDIS_URL", "redis://app:canary2@redis")
        settings = Settings()
        assert "canary" not in repr(settings) + str(settings)
        monkeypatch.setenv("REDIS_URL", "redis://app:canary2@redis?timeout=3")
        with pytest.raises(SettingsError) as caught:
            Settings()
        assert "canary" not in str(caught.value)

    def test_the_broker_gets_it_quoted(self) -> None:
        """The broker's URL has the password quoted."""
        settings = Settings(redis_url="redis://redis:6379/1", redis_password="a/b@c:d")
        assert settings.broker == "redis://:a%2Fb%40c%3Ad@redis:6379/1"
        assert redact(settings.broker) == "redis://:***@redis:6379/1"

    @pytest.mark.parametrize(
        ("url", "broker"),
        [
            ("redis://a;b:c;d%2F@host/1", "redis://a%3Bb:c%3Bd%2F@host/1"),
            ("redis+sentinel://a:b;c@s1/main", "sentinel://a:b%3Bc@s1:26379/0"),
            ("redis+sentinel://a:b@c@s1/main", "sentinel://a:b%40c@s1:26379/0"),
            ("unix://:a;b@/run/redis.sock", "redis+socket://:a%3Bb@/run/redis.sock?virtual_host=0"),
        ],
    )
    def test_a_login_that_redis_understands_is_understood_by_the_broker(
        self, url: str, broker: str
    ) -> None:
        """kombu parts a text with a `;` in two URLs. The login in a URL of ours is quoted, so it is one."""
        from kombu import Connection

        for settings in (Settings(redis_url=url), Settings(broker_url=url)):
            assert settings.broker == broker
            assert Connection(settings.broker).alt == []

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://host/0", "redis://host/0"),
            ("redis://user@host", "redis://user@host"),
            (
                "unix:///run/redis.sock?db=1&password=canary",
                "unix:///run/redis.sock?db=1&password=***",
            ),
            ("redis://:canary@a;redis://:canary@b", "redis://:***@a;redis://:***@b"),
            ("amqp://guest:canary@mq//", "amqp://guest:***@mq//"),
            ("redis://app:hun;canary@host/1", "redis://app:***@host/1"),
            ("redis://host?password=hun;canary&db=1", "redis://host?password=***&db=1"),
            ("redis+sentinel://app:hun@canary@s1,s2/main", "redis+sentinel://app:***@s1,s2/main"),
        ],
    )
    def test_any_url_can_be_shown(self, url: str, shown: str) -> None:
        """Any URL can be shown without what is behind its colon, also one of several."""
        assert redact(url) == shown
        assert "canary" not in repr(Settings(broker_url=url))
        assert redact("redis://:can#ary@a") == "redis://:***@a"

    @pytest.mark.parametrize(
        ("url", "hint"),
        [
            ("redis:6379", "; did you mean redis?"),
            ("redi://h", "; did you mean redis?"),
            ("AMQP://h", "; did you mean amqp?"),
            ("amqp:/h", "; did you mean amqp?"),
            ("localhost", ""),
        ],
    )
    def test_a_broker_that_nobody_speaks_is_refused(self, url: str, hint: str) -> None:
        """A broker's URL without a scheme that kombu knows is refused, with those that are usual."""
        with pytest.raises(SettingsError, match="amqp://") as refused:
            Settings(broker_url=url)
        assert str(refused.value).startswith(f"STILLROOM_BROKER_URL={url!r}: ")
        assert str(refused.value).endswith(f"scheme of kombu's{hint}")
        assert Settings(broker_url="amqp://h").broker == "amqp://h"

    def test_a_socket_is_spelled_as_kombu_wants_it(self) -> None:
        """The broker's URL of a socket has the scheme and database name that kombu wants."""
        settings = Settings(redis_url="unix:///run/redis.sock?db=3", redis_password="p/w")
        assert settings.broker == "redis+socket://:p%2Fw@/run/redis.sock?virtual_host=3"

    @pytest.mark.parametrize(
        ("url", "broker"),
        [
            ("redis://h?db=3", "redis://:p%2Fw@h/3"),
            ("redis://h/2?db=3&client_name=app", "redis://:p%2Fw@h/3"),
            ("redis://h/2?username=app&password=a%2Fb", "redis://app:a%2Fb@h/2"),
            ("redis://u:x@h/2?socket_keepalive=1", "redis://u:x@h/2"),
            ("rediss://h?db=1&ssl_cert_reqs=none", "rediss://:p%2Fw@h/1"),
        ],
    )
    def test_options_of_a_url_hold_for_the_broker(self, url: str, broker: str) -> None:
        """The database and login that a URL's options name are the broker's too, in a URL that kombu reads."""
        from kombu import Connection

        settings = Settings(redis_url=url, redis_password="p/w")
        assert settings.broker == broker
        Connection(settings.broker)

    @pytest.mark.parametrize("nothing", ["", " "])
    def test_what_may_be_left_out_may_be_set_to_nothing(
        self, monkeypatch: pytest.MonkeyPatch, nothing: str
    ) -> None:
        """A setting that has no value by default has none if it is set to nothing, as `${CACHE_URL:-}` leaves it.

        A list that is set to nothing is an empty one.
        """
        fields = Settings.model_fields.items()
        alone = {
            name
            for name, field in fields
            if field.default is None and "tuple" not in str(field.annotation)
        }
        assert {"cache_url", "broker_url", "flower_url", "release", "image_root"} <= alone
        for name in alone - set(SECRETS):
            monkeypatch.setenv(environment_names()[name], nothing)
        settings = Settings()
        assert {getattr(settings, name) for name in alone} == {None}
        assert settings.broker == settings.cache_server == settings.redis_url
        monkeypatch.setenv("STILLROOM_HEALTH_NETWORKS", nothing)
        assert Settings().operators == ()

    @pytest.mark.parametrize("name", SECRETS.values())
    @pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf", b"\xff\xfe", b"s" * 70_000])
    def test_a_file_without_a_secret_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes
    ) -> None:
        """An empty file is no empty password: it is refused, as one that is no text, or endless, is."""
        (tmp_path / "secret").write_bytes(content)
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
        with pytest.raises(
            SettingsError, match=f"{name}_FILE: .*: it (is empty|is no text|has more)"
        ):
            Settings()

    def test_a_pipe_is_read_if_somebody_writes_to_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A pipe, as of a shell's `<(pass redis)`, is read; one that nobody writes to holds up no process."""
        read, write = os.pipe()
        os.write(write, b"canary\n")
        os.close(write)
        monkeypatch.setenv("REDIS_PASSWORD_FILE", f"/dev/fd/{read}")
        assert Settings().password == "canary"
        os.close(read)
        os.mkfifo(tmp_path / "fifo")
        monkeypatch.setattr("stillroom.environment.PIPE_WITHIN_MS", 10)
        for path, why in ((tmp_path / "fifo", "nobody writes"), (tmp_path, "Is a directory")):
            monkeypatch.setenv("REDIS_PASSWORD_FILE", str(path))
            with pytest.raises(SettingsError, match=f"REDIS_PASSWORD_FILE: {path}: {why}"):
                Settings()

    def test_the_name_of_a_file_has_no_case_either(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Names of settings have no case, and neither have those of their files."""
        (tmp_path / "secret").write_bytes(b"\xef\xbb\xbfcanary\r\n")  # as PowerShell writes it
        monkeypatch.setenv("redis_password_file", str(tmp_path / "secret"))
        assert Settings().password == "canary"

    def test_set_to_nothing_is_not_set(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        """An empty REDIS_PASSWORD beside a file counts as unset, as a compose file with a default leaves it."""
        path = f"{tmp_path}/secret"
        with open(path, "w", encoding="utf-8") as file:
            file.write("right")
        monkeypatch.setenv("REDIS_PASSWORD", "")
        assert not Settings().password
        monkeypatch.setenv("REDIS_PASSWORD_FILE", path)
        assert Settings().password == "right"

    def test_the_broker_checks_certificates(self) -> None:
        """The broker's rediss:// needs a valid certificate unless the URL says otherwise."""
        import ssl

        from stillroom.broker import broker_tls

        assert broker_tls(Settings(redis_url="redis://x")) is None
        assert broker_tls(Settings(redis_url="rediss://x")) == {"ssl_cert_reqs": ssl.CERT_REQUIRED}
        unchecked = broker_tls(Settings(redis_url="rediss://x?ssl_cert_reqs=none"))
        assert unchecked == {"ssl_cert_reqs": ssl.CERT_NONE}

    @pytest.mark.parametrize("url", ["rediss://x", "rediss+sentinel://x/main"])
    def test_the_broker_reads_options_of_tls_as_the_cache_does(self, url: str) -> None:
        """Numbers, flags and a "no" in a URL are that to kombu too, and not text."""
        import ssl

        from stillroom.broker import broker_tls

        options = (
            "ssl_check_hostname=no&ssl_min_version=772&ssl_exclude_verify_flags=VERIFY_X509_STRICT"
        )
        settings = Settings(redis_url=f"{url}?{options}")
        assert broker_tls(settings) == {
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
            "ssl_check_hostname": False,
            "ssl_min_version": ssl.TLSVersion.TLSv1_3,
            "ssl_exclude_verify_flags": [ssl.VerifyFlags.VERIFY_X509_STRICT],
        }
        assert "ssl_" not in settings.broker

    @pytest.mark.parametrize("url", ["rediss://x", "rediss+sentinel://x/main"])
    def test_nobody_is_asked_for_the_password_of_a_key(self, url: str) -> None:
        """A key whose password is not in the URL is opened without one: OpenSSL would ask on the terminal."""
        from stillroom.broker import broker_tls

        settings = Settings(redis_url=f"{url}?ssl_certfile=/a.crt&ssl_keyfile=/a.key")
        assert (broker_tls(settings) or {})["ssl_password"] == ""

    def test_each_of_several_brokers_has_the_password(self) -> None:
        """A broker's setting may name several servers; the password is for each whose URL has none."""
        settings = Settings(broker_url="redis://a;redis://:b@b/1", redis_password="pw")
        assert settings.broker == "redis://:pw@a;redis://:b@b/1"


def test_peppers_come_from_a_variable_or_a_file_and_are_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several peppers come from a variable or a file and are never shown; both, or a short one, is refused."""
    one, two = "a" * 32, "b" * 40
    path = tmp_path / "peppers"
    path.write_text(f"{one}\n{two}\n")
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS_FILE", str(path))
    settings = Settings()
    assert [pepper.get_secret_value() for pepper in settings.session_peppers] == [one, two]
    assert one not in repr(settings)
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", f"{one},{two}")
    with pytest.raises(SettingsError, match="PEPPERS and STILLROOM_SESSION_PEPPERS_FILE are both"):
        Settings()
    monkeypatch.delenv("STILLROOM_SESSION_PEPPERS_FILE")
    assert Settings().session_peppers == settings.session_peppers
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", "canary")
    with pytest.raises(SettingsError, match="at least 32 characters") as caught:
        Settings()
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"health_networks": "10.0.0.0/8, here"}, "'here' does not appear to be"),
        ({"health_networks": "10.0.0.1/8"}, r"has host bits set; did you mean 10\.0\.0\.0/8\?"),
        ({"namespace": "my app"}, r"NAMESPACE='my app': 1 to 64 letters, digits"),
        ({"health_networks": "unix"}, "'unix' does not appear to be"),
        (
            {"ready_requires": "state broker"},
            r"READY_REQUIRES=.*: 'broker' is none; the roles are state and cache",
        ),
        ({"health_timeout": 0}, "greater than 0"),
    ],
)
def test_mistakes_in_the_settings_of_health(changes: dict[str, Any], said: str) -> None:
    """A mistake in the settings of health is refused with the given and the allowed values."""
    with pytest.raises(SettingsError, match=said):
        Settings(**changes)


def test_the_token_of_health_is_long_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The health token comes from a variable or a file; a short one is refused without being shown."""
    path = tmp_path / "token"
    path.write_text("canary-of-more-than-16\n")
    monkeypatch.setenv("STILLROOM_HEALTH_TOKEN_FILE", str(path))
    settings = Settings()
    assert settings.health_token is not None
    assert settings.health_token.get_secret_value() == "canary-of-more-than-16"
    assert "canary" not in repr(settings)
    monkeypatch.delenv("STILLROOM_HEALTH_TOKEN_FILE")
    with pytest.raises(SettingsError, match="at least 16") as caught:
        Settings(health_token="canary")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(("field", "name"), SECRETS.items())
def test_every_secret_may_come_from_a_file(
    field: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `…_FILE` names is read, for each secret that there is, and is what its own variable would be."""
    secret = "https://example.org/" + "s" * 32
    monkeypatch.setenv(
        "REDIS_URL", "redis+sentinel://s1/stillroom"
    )  # or nobody asks for a login there
    (tmp_path / "secret").write_text(secret + "\n")
    monkeypatch.setenv(name, secret)
    plain = getattr(Settings(), field)
    monkeypatch.delenv(name)
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    assert getattr(Settings(), field) == plain
    assert plain
    monkeypatch.delenv(f"{name}_FILE")
    monkeypatch.setenv(name, secret + "\r")  # of a `.env` file from Windows
    assert getattr(Settings(), field) == plain


def test_what_an_apps_own_settings_hold_is_taken() -> None:
    """URLs and networks may be objects, as pydantic-settings makes them of an app's environment."""
    dsn, network = RedisDsn("redis://app:pw@cache:6380/1"), ip_network("10.0.0.0/8")
    taken = Settings(
        redis_url=dsn,
        cache_url=SecretStr("redis://:pw@cache"),
        broker_url=AmqpDsn("amqp://u:pw@mq//"),
        webhook_url=HttpUrl("https://hooks.example/x"),
        flower_url=HttpUrl("https://flower.example/"),
        trusted_proxies=[network, "cloudflare"],
        health_networks=network,
        limit_exempt={ip_address("::1")},
    )
    assert (taken.redis_url, taken.cache_url) == (
        "redis://app:pw@cache:6380/1",
        "redis://:pw@cache",
    )
    assert (taken.broker_url, taken.flower_url) == ("amqp://u:pw@mq//", "https://flower.example/")
    assert taken.webhook_url == SecretStr("https://hooks.example/x")
    assert taken.trusted_proxies == ("10.0.0.0/8", "cloudflare")
    assert (taken.health_networks, taken.limit_exempt) == (("10.0.0.0/8",), ("::1",))
    assert Stillroom(dsn, dispatch=NoDispatch()).settings.redis_url == taken.redis_url


class Own(BaseModel):
    """An app's settings, which show what is in them."""

    url: RedisDsn = RedisDsn("redis://:canary@cache")


@pytest.mark.parametrize(
    "url", [Own(), {"url": "redis://:canary@cache"}, RedisDsn("redis://:canary@x/a")]
)
def test_no_object_in_the_place_of_a_url_shows_its_password(url: Any) -> None:
    """A refused URL is shown without its password, and what is no text by the name of its type."""
    given: list[dict[str, Any]] = [{"redis_url": url}, {"cache_url": url}, {"broker_url": url}]
    for refused in (*(partial(Settings, **one) for one in given), partial(Stillroom, url)):
        with pytest.raises(StillroomError) as caught:
            refused()
        assert "canary" not in str(caught.value)
