"""A certificate authority of a test's own, and its certificates. Needs the program openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """An authority that signs for names and addresses. `is_possible()` says whether there is an openssl."""

    def __init__(self, folder: Path, name: str = "authority", *, says_its_use: bool = True) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._own = Pair(folder / f"{name}.crt", folder / f"{name}.key")
        given = ("-subj", f"/CN={name}", *_OF_AUTHORITY, *(_USE if says_its_use else ()))
        _openssl("req", "-x509", *_NEW_KEY, *given, "-days", "2", *_out(self._own))

    @staticmethod
    def is_possible() -> bool:
        return shutil.which("openssl") is not None

    @property
    def certificate(self) -> Path:
        """Return the certificate by which a client trusts this authority."""
        return self._own.certificate

    def sign(self, name: str, *addresses: str) -> Pair:
        """Sign a certificate for this name and these addresses."""
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        names = ",".join([f"DNS:{name}", *(f"IP:{address}" for address in addresses)])
        given = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={names}", *_OF_A_SERVER)
        signed_by = ("-CA", str(self._own.certificate), "-CAkey", str(self._own.key))
        _openssl("req", "-x509", *_NEW_KEY, *given, *signed_by, "-days", "2", *_out(pair))
        return pair


# Python 3.13 trusts no authority that does not say what its key is for.
_USE = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
_OF_AUTHORITY = ("-addext", "basicConstraints=critical,CA:TRUE")
_OF_A_SERVER = ("-addext", "basicConstraints=critical,CA:FALSE")
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _out(pair: Pair) -> tuple[str, ...]:
    return "-out", str(pair.certificate), "-keyout", str(pair.key)


def _openssl(*words: str) -> None:
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
