"""Every setting, its default and its unit, in one frozen model.

A setting is read from the environment under the name in its alias, or under `STILLROOM_` and its own
name in capitals. A secret may come from a file: `REDIS_PASSWORD_FILE` names it (both set is an error, and so is a
file that is empty). What has no value by default has none if it is set to nothing.
The docstring below a setting is what the reference says of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from stillroom.address import is_sentinel
from stillroom.edges import networks_of
from stillroom.environment import PREFIX, SECRETS, read_environment, unknown_setting
from stillroom.errors import SettingsError, did_you_mean
from stillroom.place import is_same_place
from stillroom.setting_types import (
    UNIX,
    BrokerOrNone,
    Networks,
    PathOrNone,
    Proxies,
    ProxyHeader,
    RedisUrl,
    ReplicasOrNone,
    Seconds,
    SecondsKept,
    SecondsOrNone,
    Secrets,
    TextOrNone,
    UrlOrNone,
    Words,
    text_of_url,
)
from stillroom.urls import check_node, for_broker, redact

URLS = ("_url", "_backend")  # how a setting's name ends that may hold a password in the middle
ROLES = ("state", "cache")  # of servers
LOOPBACK = ("127.0.0.0/8", "::1/128")


class Settings(BaseModel):
    """All settings of one room. Times are seconds, sizes are bytes."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    # Where Redis is. Three roles, one server until you say otherwise.
    redis_url: RedisUrl = Field("redis://redis:6379", alias="REDIS_URL")
    """The Redis server: `redis://`, `rediss://` (TLS) or `unix://`, with an ACL user and a database if you use
    them; or Sentinels, `redis+sentinel://host:26379,host:26379/<master>/<database>`."""
    redis_password: SecretStr | None = Field(None, alias="REDIS_PASSWORD")
    """The password for all servers whose URL has none. No log, error or repr shows it."""
    sentinel_user: TextOrNone = None
    """The user at the Sentinels that a `redis+sentinel://` URL names, if they need one."""
    sentinel_password: SecretStr | None = Field(None, alias="STILLROOM_SENTINEL_PASSWORD")
    """The password at the Sentinels, if they need one."""
    cache_url: UrlOrNone = None
    """The server of the cache, which may evict (`allkeys-lfu`). If its data are lost, the cache is cold. Default:
    REDIS_URL."""
    cluster: bool = False
    """Set this if `cache_url` is a node of a Redis Cluster, or a name that several of its nodes have."""
    state_cluster: bool = False
    """Set this if `REDIS_URL` is a node of a Redis Cluster, or a name that several of its nodes have: sessions,
    limits, bans, abuse and health are on it then. It needs a `cache_url` and a `broker_url`. All processes of a
    namespace have the same value."""
    shards: int = Field(1, ge=1, le=64)
    """How many shards the cache has; in a cluster each is on one node. All processes of a namespace have the
    same number. A process with another one works without the cache (SettingsDiffer);
    docs/operating.md has the steps for changing it."""
    broker_url: BrokerOrNone = None
    """The Celery broker: a server that may not evict (`noeviction`), or any broker kombu speaks. Default:
    REDIS_URL."""
    replicas: int = Field(0, ge=0, le=10)
    """How many replicas must have an invalidation, a logout, a rotation or a reservation before the call
    returns. All processes of a namespace have the same number; docs/operating.md has the steps for changing
    it."""
    cache_replicas: ReplicasOrNone = None
    """How many replicas must have what is written on the server of the cache alone: invalidations and stored
    values. Set 0 if `cache_url` names a server that has no replicas. Default: STILLROOM_REPLICAS."""
    namespace: str = Field("stillroom", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """The first part of every key. Apps that share a server have different ones."""

    # Starting up: patient, and says so.
    connect_attempts: int = Field(5, ge=1, le=1_000)
    """How often `room.connect()` tries to reach Redis."""
    connect_delay: Seconds = 5.0
    """Seconds between two of these attempts."""

    # Inside a request: never sleeps.
    connect_timeout: Seconds = 0.1
    """Seconds to open a connection. In a worker the default is 1."""
    command_timeout: Seconds = 0.1
    """Seconds for one batch of commands, from its sending to its last reply. In a worker the default is 2."""
    call_timeout: Seconds = 0.15
    """Seconds for all batches of one call together. In a worker the default is 5. A loader's own time is not
    counted."""
    request_timeout: Seconds = 0.25
    """Seconds for all calls of a request (`with room.request()`) together. After that they fall back at once."""
    pool_size: int = Field(64, ge=1, le=10_000)
    """How many connections a process may open to each server."""
    pool_timeout: Seconds = 0.02
    """Seconds to wait for a free connection if all are in use."""

    # The circuit breaker.
    breaker_failures: int = Field(5, ge=1)
    """The breaker opens after this many failures in a row."""
    breaker_ratio: float = Field(0.5, gt=0, le=1)
    """The breaker also opens when this share of the calls of a window fails."""
    breaker_calls: int = Field(20, ge=1)
    """How many calls a window must have before their share counts."""
    breaker_window: Seconds = 10.0
    """Seconds of that window."""
    probe_delay: Seconds = 0.25
    """Seconds from the opening to the first probe. Each next probe waits twice as long."""
    probe_limit: Seconds = 1.0
    """Seconds between two probes at most."""

    # The cache.
    ttl: SecondsKept = 300.0
    """Seconds an entry is fresh."""
    swr: SecondsOrNone = 0.0
    """Seconds after that in which an entry is served stale while a worker refreshes it."""
    jitter: float = Field(0.1, ge=0, le=0.5)
    """The share of its `ttl` by which an entry may end earlier, by chance, so that entries stored together do
    not end together."""
    life_limit: Seconds = 7 * 86_400.0
    """The most that `ttl` and `swr` of an entry may be together, in seconds. Marks of invalidations are kept
    this long."""
    lease_limit: Seconds = 300.0
    """The longest lease, in seconds. It bounds how late a load can still be stored."""
    lease: SecondsKept = 10.0
    """Seconds a loader may take. The value of a slower one is returned and not stored."""
    wait: Seconds = 10.0
    """Seconds a caller waits for another caller's load of the key before it loads for itself."""
    refresh_lease: SecondsKept = 30.0
    """Seconds after which a refresh that was ordered and not done is ordered again."""
    backoff: SecondsKept = 1.0
    """Seconds for which a key is not refreshed after a refresh has failed. They double with each failure in a
    row."""
    backoff_limit: SecondsKept = 300.0
    """The most that `backoff` grows to, in seconds."""
    refresh_rate: float = Field(20.0, gt=0, le=10_000)
    """Loads a second that workers make after a soft invalidation."""
    value_limit: int = Field(1024 * 1024, ge=64)
    """The largest value, in bytes as stored. A larger one raises ValueTooLarge, or is returned and not stored
    by a loader."""
    decoded_limit: int = Field(8 * 1024 * 1024, ge=64)
    """The largest value after decompression, in bytes. A larger one is a miss."""
    compress_above: int = Field(1024 * 1024, ge=0)
    """Bytes of JSON above which a value is compressed. A lower number saves memory and costs CPU."""
    outbox_limit: int = Field(10_000, ge=1)
    """Deferred invalidations a process keeps while Redis is away. One more turns them into one `clear()`."""
    marks_limit: int = Field(20_000, ge=100)
    """How many invalidations a process remembers."""
    near_limit: int = Field(64 * 1024 * 1024, ge=0)
    """Bytes of copies that a process keeps for loaders and reads with `near`."""
    near_away: SecondsOrNone = 0.0
    """Seconds for which a process serves these copies while Redis is away. Other processes may have invalidated
    them. 0: it does not serve them."""
    away_ttl: float = Field(1.0, ge=0, le=60)
    """Seconds for which a process serves a value that it has just loaded while Redis is away. 0: each caller
    loads for itself."""
    away_limit: int = Field(16 * 1024 * 1024, ge=0)
    """Bytes of values that a process keeps for `away_ttl`."""

    # Images.
    image_root: PathOrNone = None
    """The folder of images for `get_image_info`. Without it the call raises ImagesUnavailable."""
    image_byte_limit: int = Field(50 * 1024 * 1024, ge=1)
    """The largest image file, in bytes."""
    image_pixel_limit: int = Field(100_000_000, ge=1)
    """The largest image, in pixels (width times height)."""

    # Sessions.
    production: bool = False
    """Set this in production. Then sessions without a pepper are an error."""
    session_peppers: Secrets = Field((), alias="STILLROOM_SESSION_PEPPERS")
    """Secrets of 32 characters or more with which tokens and user names are hashed. New tokens use the first one;
    tokens in use are found under each."""
    session_idle: SecondsKept = 86_400.0
    """Seconds without a request after which a session ends."""
    session_absolute: SecondsKept = 7 * 86_400.0
    """Seconds after which a session ends in any case."""
    session_touch: Seconds = 60.0
    """How often at most the time when a session was last seen is written, in seconds; or a twentieth of its idle
    time, if that is shorter."""
    session_grace: Annotated[SecondsOrNone, Field(le=3_600)] = 10.0
    """Seconds in which the old token still works after a rotation."""
    session_shards: int = Field(16, ge=1, le=256)
    """How many shards the sessions' indexes have. The number may grow; it must not shrink while sessions
    live."""
    session_data_limit: int = Field(64 * 1024, ge=64)
    """The largest session, in bytes of keys and JSON."""
    session_keys_limit: int = Field(64, ge=1, le=1_000)
    """The most keys in a session."""
    session_device_memory: SecondsKept = 180 * 86_400.0
    """Seconds for which a user's device is known after its last login. A login from an unknown one is an
    event."""
    session_login_drops: Words = ("csrf_token", "_csrf_token", "csrf", "_csrftoken")
    """Keys of the session that a login does not keep, because an attacker who planted that session knows
    their values."""

    # Rate limits.
    trusted_proxies: Proxies = ()
    """The only peers whose header about the client is believed: networks (`10.0.0.0/8`), `unix` for a socket
    file, `cloudflare`. Any other peer is taken for the client."""
    proxy_header: ProxyHeader = "x-forwarded-for"
    """The header in which trusted proxies name the client. `x-forwarded-for` and `forwarded` are chains to which
    each proxy adds. The others hold one address, so the proxy next to the app must overwrite what it was sent."""
    limit_v6_prefix: int = Field(64, ge=56, le=64)
    """Bits of an IPv6 address that tell clients apart: a household usually has a whole /64."""
    limit_exempt: Networks | None = None
    """Networks that no limit counts. Default: those of `abuse_allow`."""
    processes: int = Field(1, ge=1, le=100_000)
    """How many processes the app has. While Redis is away, each admits its share of a quota."""
    limits_strict_503: bool = False
    """Set this if strict limits (AUTH) are to answer 503 while Redis is away, instead of admitting this process's
    share. If a mistake in the configuration keeps Redis from deciding, they always answer 503."""
    local_limits: int = Field(50_000, ge=1)
    """How many pairs of subject and limit a process counts by itself while Redis is away."""
    limits_memory: int = Field(10_000, ge=1)
    """For how many pairs of subject and limit a process remembers the last state or denial."""

    # Abuse.
    abuse_rules: PathOrNone = None
    """A TOML file that changes the built-in rules and adds others."""
    abuse_allow: Networks = ()
    """Networks that are never banned, besides trusted proxies and private ranges."""
    ban_file: PathOrNone = None
    """The file through which processes of this machine share bans, so that these hold while Redis is away.
    Default: a file in the temporary folder of this user. `/dev/null`: each process knows only the bans that it has
    met."""
    ban_cap: int = Field(60, ge=0, le=10_000)
    """How many bans rules make in a minute. Further patterns are only logged."""

    # Health.
    health_timeout: Seconds = 0.2
    """Seconds for one check, whatever Redis does."""
    health_token: SecretStr | None = Field(None, alias="STILLROOM_HEALTH_TOKEN", min_length=16)
    """A secret of 16 characters or more that opens the details of /health, /metrics and /status: as
    `Authorization: Bearer …`, or as the password that a browser asks for."""
    explain_header: bool = False
    """Set this if responses are to explain each read of the cache in `X-Stillroom-Explain`. Only requests that
    bring the health token in a header of the same name get it; outside of production also requests to an app in
    debug mode."""
    health_networks: Networks | None = None
    """Networks whose requests need no token, unless they come through a trusted proxy. Default: this machine; none
    if a token is set, because a proxy on this machine that adds no header would look like an operator."""
    metrics_open: bool = False
    """Set this to open /metrics to everybody who can reach it."""
    ready_requires: Words = ()
    """Roles (`state`, `cache`) whose outage makes /health/ready answer 503. By default there are none: an outage
    would take all processes out of service at once, although they can work without Redis."""
    health_accept: Words = ()
    """Codes of findings that are known and accepted, such as `server_old`. They are not reported."""
    webhook_url: SecretStr | None = Field(None, alias="STILLROOM_WEBHOOK_URL")
    """Where workers post findings and patterns of abuse, as JSON: `https://…` or `http://…`. It is treated as a
    secret."""
    webhook_secret: SecretStr | None = Field(None, alias="STILLROOM_WEBHOOK_SECRET")
    """The secret with which these posts are signed."""
    release: TextOrNone = None
    """The app's version, shown in /health as `releaseId`."""
    otel: bool = False
    """Set this to send calls to OpenTelemetry as spans and metrics. Needs the extra `stillroom[otel]`."""
    flower_url: TextOrNone = None
    """Where Flower is, for the link on /status."""

    # The workers.
    loaders: Words = ()
    """Modules that register loaders, as `shop.cache` or `shop.cache:room`."""
    loaders_timeout: Seconds = 60.0
    """Seconds for importing these modules. A worker for which this takes longer ends."""
    worker_threads: int = Field(8, ge=1, le=1_000)
    """How many threads a worker has."""
    result_backend: UrlOrNone = None
    """The server that keeps the results of orders sent by name, for an hour. Without one they are not kept."""
    heartbeat_file: PathOrNone = None
    """A file that a worker touches as long as it is able to work, for a container's health check."""

    _in_code: frozenset[str] = PrivateAttr(frozenset())  # values given by name: they come first

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**read_environment(environment_names(), but=values), **values)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None
        self._in_code = frozenset(values)

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.ttl + self.swr > self.life_limit:
            raise ValueError(
                f"STILLROOM_TTL + STILLROOM_SWR is {self.ttl + self.swr:,.15g} s; "
                f"STILLROOM_LIFE_LIMIT allows {self.life_limit:,.15g} s"
            )
        for name, lease in {"LEASE": self.lease, "REFRESH_LEASE": self.refresh_lease}.items():
            if lease > self.lease_limit:
                raise ValueError(
                    f"STILLROOM_{name} is {lease:,.15g} s; STILLROOM_LEASE_LIMIT allows {self.lease_limit:,.15g} s"
                )
        return self

    @field_validator("ready_requires")
    @classmethod
    def _check_roles(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        for role in roles:
            if role not in ROLES:
                hint = did_you_mean(role, ROLES)
                raise ValueError(f"{role!r} is none; the roles are {' and '.join(ROLES)}{hint}")
        return roles

    @field_validator("webhook_url", "flower_url", mode="before")
    @classmethod
    def _as_text(cls, url: object) -> object:
        return text_of_url(url)

    @field_validator("webhook_url")
    @classmethod
    def _check_webhook(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        address = url.get_secret_value().strip()
        if address.partition("://")[0].lower() not in ("http", "https"):
            raise ValueError("a webhook's address begins with https:// or http://")
        if not address.isascii() or len(address.split()) != 1:
            raise ValueError(
                "in a webhook's address a space, or a letter like ä, is written as %20 or %C3%A4"
            )
        if not _has_host(address):
            raise ValueError("a webhook's address has a host, and a port up to 65,535 if any")
        return SecretStr(address)

    @model_validator(mode="after")
    def _check_sentinels(self) -> Settings:
        urls = [self.redis_url, self.cache_url or "", self.broker_url or ""]
        has_login = self.sentinel_password is not None or self.sentinel_user is not None
        if has_login and not any(map(is_sentinel, urls)):
            raise ValueError(
                "STILLROOM_SENTINEL_USER and STILLROOM_SENTINEL_PASSWORD are for the Sentinels that a "
                "redis+sentinel:// URL names, and no URL names any"
            )
        if self.sentinel_user is not None and self.sentinel_password is None:
            raise ValueError(
                "STILLROOM_SENTINEL_USER is set, and STILLROOM_SENTINEL_PASSWORD is not"
            )
        return self

    @model_validator(mode="after")
    def _check_cluster(self) -> Settings:
        if self.cluster:
            if self.cache_url is None:
                raise ValueError("STILLROOM_CLUSTER is for the cache: set STILLROOM_CACHE_URL")
            if self.cache_url == self.redis_url and not self.state_cluster:
                raise ValueError(
                    "STILLROOM_CLUSTER is for the cache alone: set STILLROOM_CACHE_URL, and a REDIS_URL that is "
                    "no cluster; or set STILLROOM_STATE_CLUSTER=1, if sessions and limits are to be on it, too"
                )
            check_node(self.cache_url)
        return self

    @model_validator(mode="after")
    def _check_state_cluster(self) -> Settings:
        if not self.state_cluster:
            return self
        check_node(self.redis_url)
        if self.cache_url is None or (self.cache_url == self.redis_url and not self.cluster):
            raise ValueError(
                "STILLROOM_STATE_CLUSTER is for sessions and limits alone: set STILLROOM_CACHE_URL. If the cache "
                "is on a cluster, too, set STILLROOM_CLUSTER=1"
            )
        if self.broker_url is None:
            raise ValueError(
                "STILLROOM_STATE_CLUSTER needs STILLROOM_BROKER_URL, which leads to one server, to Sentinels, "
                "or to RabbitMQ: Celery can't use a cluster as its broker"
            )
        return self

    def is_in_code(self, field: str, name: str) -> bool:
        """Return whether a setting was given in code by name, as a field or as the environment calls it."""
        return field in self._in_code or name in self._in_code

    @property
    def password(self) -> str | None:
        """Return the password for servers whose URL has none; no repr shows it."""
        return self.redis_password.get_secret_value() if self.redis_password else None

    @property
    def replicas_of_cache(self) -> int:
        """Return how many replicas have an invalidation before it returns."""
        return self.replicas if self.cache_replicas is None else self.cache_replicas

    @property
    def proxy_networks(self) -> tuple[str, ...]:
        """Return the networks of the trusted proxies, without those that come through a socket file."""
        return networks_of([text for text in self.trusted_proxies if text != UNIX])

    @property
    def exempt(self) -> tuple[str, ...]:
        """Return the networks that no limit counts."""
        return self.abuse_allow if self.limit_exempt is None else self.limit_exempt

    @property
    def operators(self) -> tuple[str, ...]:
        """Return the networks from which an operator needs no token."""
        if self.health_networks is not None:
            return self.health_networks
        return () if self.health_token else LOOPBACK

    @property
    def sentinel_login(self) -> dict[str, str]:
        """Return the login for the Sentinels, as redis-py's options."""
        if self.sentinel_password is None:
            return {}
        named = {} if self.sentinel_user is None else {"username": self.sentinel_user}
        return named | {"password": self.sentinel_password.get_secret_value()}

    @property
    def cache_server(self) -> str:
        """Return the URL of the server that holds the cache (without the password setting)."""
        return self.cache_url or self.redis_url

    @property
    def broker(self) -> str:
        """Return the broker's URL for Celery, the password filled in where the URL has none."""
        return for_broker(self.broker_url or self.redis_url, self.password)

    @property
    def results(self) -> str | None:
        """Return where workers keep results, in Celery's form, or None.

        Celery's own CELERY_RESULT_BACKEND counts only where it is the broker: a project that has a Celery app too
        sets it for that app, and a sender of ours that looks for its result there means the same Redis.
        """
        url = self.result_backend
        if url is None and is_same_place(os.environ.get("CELERY_RESULT_BACKEND"), self.broker):
            return self.broker
        return None if url is None else for_broker(url, self.password)

    def differs_in(self, other: Settings) -> str:
        """Return the name of the first setting by which another process is elsewhere; empty if there is none.

        A worker looks alive then, and does nothing for that process; a command sees nothing of it.
        """
        urls = {
            "REDIS_URL": (self.redis_url, other.redis_url),
            "STILLROOM_CACHE_URL": (self.cache_server, other.cache_server),
            "STILLROOM_BROKER_URL": (self.broker, other.broker),
        }
        if self.namespace != other.namespace:
            return "STILLROOM_NAMESPACE"
        apart = (
            name
            for name, (ours, theirs) in urls.items()
            if ours != theirs and is_same_place(ours, theirs) is False
        )
        return next(apart, "")

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            is_url = name and name.endswith(URLS) and isinstance(value, str)
            yield name, redact(value) if is_url else value


def environment_names() -> dict[str, str]:
    """Return the name of each setting in the environment."""
    fields = Settings.model_fields
    return {name: field.alias or f"{PREFIX}{name.upper()}" for name, field in fields.items()}


# What pydantic says of a wrong type, for who has never heard of pydantic.
PLAINLY = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "a text",
    "tuple_type": "a text, or a list of texts",
    "path_type": "the path of a file",
}


def _explain(error: ValidationError) -> str:
    names = environment_names()
    fields = {alias: field for field, alias in names.items()} | {field: field for field in names}
    return "\n".join(_explain_one(detail, fields, names) for detail in error.errors())


def _explain_one(detail: Any, fields: Mapping[str, str], names: Mapping[str, str]) -> str:
    where = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        return unknown_setting(where, names)
    message = PLAINLY.get(detail["type"], str(detail["msg"]).removeprefix("Value error, "))
    if not where:
        return message
    name = fields.get(where, where)
    if detail["type"] == "literal_error":
        message += did_you_mean(detail["input"], get_args(Settings.model_fields[name].annotation))
    if detail["type"].startswith("bool_"):
        message = "0 or 1"
    if detail["type"] == "string_pattern_mismatch":
        message = "1 to 64 letters, digits or any of . _ -"  # the namespace's
    if detail["type"] == "too_short" and name in SECRETS:
        message = "at least {min_length} characters, not {actual_length}".format(**detail["ctx"])
    if _is_quoted(detail["input"]):
        message += "; leave out the quotes around it: `docker --env-file` keeps them"
    return f"{names.get(name, where)}={_given(name, detail['input'])}: {message}"


def _is_quoted(value: object) -> bool:
    return isinstance(value, str) and value[:1] in ("'", '"') and value[:1] == value[-1:]


def _given(name: str, value: object) -> str:
    if name in SECRETS:
        return "***"
    return shown_url(value) if name.endswith(URLS) and value is not None else repr(value)


def shown_url(value: object) -> str:
    """Return a URL without its password, and of what is none the type: a repr might show a password, too."""
    text = text_of_url(value)
    return repr(redact(text)) if isinstance(text, str) else f"<{type(value).__name__}>"


def _has_host(url: str) -> bool:
    """Return whether a web address names a host, and no port that there can't be."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
