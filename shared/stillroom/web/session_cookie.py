"""The session's cookie: found among what a browser sends, and written. Pure.

Source: RFC 6265bis; `__Host-` makes a browser refuse the cookie unless it is Secure, for Path=/ and without a
Domain, so that neither a sibling domain nor plain http can plant one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stillroom.errors import SettingsError
from stillroom.sessions.token import is_token

SAME_SITE = ("Lax", "Strict", "None")
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)  # RFC 9110 token


@dataclass(frozen=True, slots=True)
class SessionCookie:
    """How the cookie is called and kept. The defaults are for https.

    A browser on a plain http page needs `SessionCookie("sid", secure=False)`, which any sibling domain can
    overwrite. Raises SettingsError.
    """

    name: str = "__Host-sid"
    secure: bool = True
    same_site: str = "Lax"  # or Strict, or None, which needs Secure

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(f"name={self.name!r}: 1 to 64 letters, digits and _ - .")
        if self.same_site not in SAME_SITE:
            raise SettingsError(f"same_site={self.same_site!r}: one of {', '.join(SAME_SITE)}")
        if not self.secure and (self.name.startswith("__") or self.same_site == "None"):
            raise SettingsError(
                "secure=False: browsers refuse that for names in __Host- and __Secure- and for same_site None"
            )

    def read(self, header: str) -> str | None:
        """The token in a Cookie header, or None. Other cookies, and what no token looks like, are passed over.

        Two different tokens are none: no browser sends two under a `__Host-` name, so one of them was planted, and
        which of them comes first is up to whoever planted it (the longer Path).
        """
        pairs = (pair.partition("=") for pair in header.split(";") if self.name in pair)
        values = {value.strip(" \t") for name, _, value in pairs if name.strip(" \t") == self.name}
        tokens = {value for value in values if is_token(value)}
        return tokens.pop() if len(tokens) == 1 else None

    def write(self, token: str, seconds: float) -> str:
        """The Set-Cookie header that keeps this token for so long."""
        if not is_token(token):
            raise ValueError("only a token can be put into a header")
        return f"{self.name}={token}; Max-Age={max(1, int(seconds))}; {self._attributes}"

    def clear(self) -> str:
        """The Set-Cookie header that makes a browser forget it."""
        return f"{self.name}=; Max-Age=0; {self._attributes}"

    @property
    def _attributes(self) -> str:
        secure = "; Secure" if self.secure else ""
        return f"Path=/; HttpOnly; SameSite={self.same_site}{secure}"
