"""The session's cookie: found among what a browser sends, and written. Pure, but for the log.

Source: RFC 6265bis; `__Host-` makes a browser refuse the cookie unless it is Secure, for Path=/ and without a
Domain, so that neither a sibling domain nor plain http can plant one. `__Host-Http-` also has to be HttpOnly and
set by a header (draft-ietf-httpbis-layered-cookies-02): a browser that does not know it yet still keeps the
`__Host-` half of it.
"""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from stillroom.errors import SettingsError, did_you_mean
from stillroom.misuse import explained
from stillroom.sessions.token import is_token

log = logging.getLogger("stillroom.web")

SameSite = Literal["Lax", "Strict", "None"]
SAME_SITE: tuple[SameSite, ...] = get_args(SameSite)
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)  # RFC 9110 token
_DOMAIN = re.compile(r"\.?[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", re.ASCII)
_PATH = re.compile(r"/[!-:<-~]{0,255}", re.ASCII)  # no ; and no space


@explained
@dataclass(frozen=True, slots=True)
class SessionCookie:
    """Hold the name of the session's cookie, and how a browser keeps it. The defaults are for https.

    A browser on a plain http page needs `SessionCookie("sid", secure=False)`, which any sibling domain can
    overwrite. `persistent=False`: the browser forgets it when it is closed. Raises SettingsError.
    """

    name: str = "__Host-sid"
    secure: bool = True
    same_site: SameSite = "Lax"  # or "Strict", or the text "None", which needs Secure
    domain: str | None = None  # None: this host alone
    path: str = "/"
    http_only: bool = True
    partitioned: bool = False  # a cookie jar for each site that embeds this one (CHIPS)
    persistent: bool = True  # kept up to the session's end

    def __post_init__(self) -> None:
        self._check_types()
        if not _NAME.fullmatch(self.name):
            raise SettingsError(f"name={self.name!r}: 1 to 64 letters, digits and _ - .")
        if self.same_site not in SAME_SITE:
            hint = did_you_mean(self.same_site, SAME_SITE, "'%s'")
            raise SettingsError(
                f"same_site={self.same_site!r}: one of {', '.join(map(repr, SAME_SITE))}{hint}"
            )
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise SettingsError(f"domain={self.domain!r}: a host's name, such as example.com")
        if not _PATH.fullmatch(self.path):
            raise SettingsError(f"path={self.path!r}: it begins with / and has no ; and no space")
        self._check_what_browsers_refuse()

    def _check_types(self) -> None:
        for name in ("name", "path", "domain"):
            given = getattr(self, name)
            if not isinstance(given, str) and not (name == "domain" and given is None):
                raise SettingsError(f"{name}={given!r}: a str")
        for name in ("secure", "http_only", "partitioned", "persistent"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name}={getattr(self, name)!r}: True or False")

    def _check_what_browsers_refuse(self) -> None:
        name = self.name.lower()
        if not self.secure and (name.startswith("__") or self.same_site == "None"):
            raise SettingsError(
                "secure=False: browsers refuse that for names in __Host- and __Secure- and for same_site None"
            )
        if not self.secure and self.partitioned:
            raise SettingsError("secure=False: browsers refuse that for a partitioned cookie")
        if name.startswith("__host-") and (self.domain is not None or self.path != "/"):
            raise SettingsError(
                f"name={self.name!r}: browsers refuse a __Host- cookie with a domain or another path than /; "
                "__Secure- allows both"
            )
        if not self.http_only and name.startswith(("__host-http-", "__http-")):
            raise SettingsError(f"name={self.name!r}: browsers refuse that for http_only=False")

    def read(self, header: str) -> str | None:
        """Return the token in a Cookie header, or None. Other cookies, and what no token looks like, are passed
        over.

        Two different tokens are none: no browser sends two under a `__Host-` name, so one of them was planted, and
        which of them comes first is up to whoever planted it (the longer Path).
        """
        token = None
        for pair in header.split(";"):
            if self.name not in pair:
                continue
            name, _, value = pair.partition("=")
            given = value.strip(" \t")
            if name.strip(" \t") != self.name or given == token or not is_token(given):
                continue
            if token is not None:
                _tell_of_two(self.name)
                return None
            token = given
        return token

    def write(self, token: str, seconds: float | None) -> str:
        """Return the Set-Cookie header that keeps this token for so long; None: until the browser is closed."""
        if not is_token(token):
            raise ValueError("only a token can be put into a header")
        age = "" if seconds is None else f"Max-Age={max(1, int(seconds))}; "
        return f"{self.name}={token}; {age}{self._attributes}"

    def clear(self) -> str:
        """Return the Set-Cookie header that makes a browser forget it."""
        return f"{self.name}=; Max-Age=0; {self._attributes}"

    def for_test_client(self) -> SessionCookie:
        """Return the same cookie without Secure: a test client on http://testserver would not send it back.

        No browser takes it like this, whose rules __post_init__ keeps.
        """
        other = copy.copy(self)
        object.__setattr__(other, "secure", False)
        return other

    @property
    def _attributes(self) -> str:
        # A dot in front means the same to browsers, and not to each test client.
        domain = f"; Domain={self.domain.removeprefix('.')}" if self.domain else ""
        flags = "; HttpOnly" if self.http_only else ""
        secure = "; Secure" if self.secure else ""
        apart = "; Partitioned" if self.partitioned else ""
        return f"Path={self.path}{domain}{flags}; SameSite={self.same_site}{secure}{apart}"


@lru_cache
def _tell_of_two(name: str) -> None:
    """Log once that browsers have two cookies of this name: who has them can't log in."""
    log.warning(
        "a browser sent two different tokens as %s, which is no session: one was planted, or the cookie had another"
        " domain, path or partitioned= before. Give a cookie that is kept in another way another name",
        name,
    )
