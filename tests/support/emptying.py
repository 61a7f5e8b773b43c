"""A server for the next test."""

from __future__ import annotations

import socket

from stillroom.embedded import EmbeddedServer

COMMANDS = b"FLUSHALL\r\nSCRIPT FLUSH\r\n"
ANSWERS = b"+OK\r\n" * 2


def emptied(server: EmbeddedServer) -> EmbeddedServer:
    """Return the server without data and scripts. It is done before thousands of tests, so not by a client."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(COMMANDS)
        answers = b""
        while len(answers) < len(ANSWERS):
            some = connection.recv(1_000)
            assert some, f"it hung up after {answers!r}"
            answers += some
    assert answers == ANSWERS
    return server
