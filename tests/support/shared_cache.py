"""A real shared cache in front of an app: Apache's mod_cache, as Debian ships it and as it comes."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillroom.leash import until

APACHE = shutil.which("apache2") or shutil.which("apache2", path="/usr/sbin")
MODULES = Path("/usr/lib/apache2/modules")
WITHIN = 40.0
LOADED = (
    "mpm_event",
    "authz_core",
    "proxy",
    "proxy_http",
    "cache",
    "cache_socache",
    "socache_shmcb",
)


@contextmanager
def shared_cache(behind: int, folder: Path) -> Iterator[int]:
    """Yield the port of a cache before the app on port `behind`. Skips the test where there is no Apache."""
    if APACHE is None or not (MODULES / "mod_cache.so").exists():
        pytest.skip("apache2 with mod_cache is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "apache.conf").write_text(_conf(port, behind, folder))
    process = subprocess.Popen([APACHE, "-f", folder / "apache.conf", "-DFOREGROUND"])
    try:
        assert until(lambda: _answers(port), WITHIN), (folder / "errors").read_text()
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(WITHIN)


def _conf(port: int, behind: int, folder: Path) -> str:
    modules = [f"LoadModule {name}_module {MODULES}/mod_{name}.so" for name in LOADED]
    return "\n".join(
        [
            *modules,
            f"ServerRoot {folder}",
            f"PidFile {folder}/pid",
            f"ErrorLog {folder}/errors",
            "ServerName localhost",
            "User www-data",
            "Group www-data",
            f"Listen 127.0.0.1:{port}",
            f"ProxyPass / http://127.0.0.1:{behind}/",
            f"CacheSocache shmcb:{folder}/kept(4000000)",
            "CacheEnable socache /",
            "",
        ]
    )


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False
