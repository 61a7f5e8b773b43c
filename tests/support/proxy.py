"""A TCP proxy in front of a server: delays, drips, holds back and forgets, by hand."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self


class Proxy:
    """Forwards to `port`. What a client sent while requests are held arrives when they are let go,
    even if the client has closed its connection by then: that is what a slow network does."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", own_port: int = 0) -> None:
        self._target = port
        self._listener = socket.create_server((host, own_port))
        self.url = f"redis://{host}:{self._listener.getsockname()[1]}"
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []
        self._silent: list[socket.socket] = []  # who came while it was cut
        self._half: set[frozenset[socket.socket]] = set()  # one direction has ended
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.drip: float | None = None  # seconds between two bytes of a reply
        self.sip: float | None = None  # seconds between two pieces of a request, 64 KB each
        self.held = threading.Event()  # set when a request is being held back
        self.says: tuple[bytes, bytes] = b"", b""  # in replies the first is replaced by the second
        self._is_cut = False
        self._forgotten: set[socket.socket] = set()
        self.cuts_next = False  # what the server answers next is lost, and the connection with it
        self._answering = threading.Event()
        self._answering.set()
        self._word: bytes | None = None
        self._kept: tuple[socket.socket, bytes] | None = None
        self._answered_late = threading.Event()

    def keep(self, word: bytes) -> None:
        """Keep back the next request that holds `word`, and cut its client off: for it the connection has died."""
        self._word, self._kept = word, None

    @property
    def has_kept(self) -> bool:
        return self._kept is not None

    def deliver_late(self) -> None:
        """Deliver the kept request now; return when the server has answered it, to nobody."""
        assert self._kept is not None, "nothing was kept back"
        far, data = self._kept
        self._answered_late.clear()
        far.sendall(data)
        assert self._answered_late.wait(5), "no answer to what came late"

    def lead_to(self, port: int) -> None:
        """Lead this address to another server from now on, and cut the connections to the former one."""
        self._target = port
        self._shut()

    def hold_requests(self) -> None:
        self.held.clear()
        self._flowing.clear()

    def let_go(self) -> None:
        self._flowing.set()
        self._answering.set()

    def hold_replies(self) -> None:
        """Let the server act, and hold its answers back."""
        self._answering.clear()

    def lead_new_ones_to(self, port: int) -> None:
        """Lead new connections to another server; existing ones stay."""
        self._target = port

    def cut(self) -> None:
        """Let nothing pass from now on, silently: connections stay open."""
        self._is_cut = True

    def forget(self) -> None:
        """Let nothing pass on the connections that there are, silently. New ones pass: a firewall has restarted."""
        with self._lock:
            self._forgotten = {*self._sockets}

    def heal(self) -> None:
        """Let new connections pass again, and close those that were cut."""
        self._is_cut = False
        self._shut()

    def _shut(self) -> None:
        with self._lock:
            silent, self._silent = self._silent, []
            sockets = [*self._sockets]
        for sock in silent:
            sock.close()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self.let_go()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._shut()
        for thread in self._threads:
            thread.join()
        for sock in [self._listener, *self._sockets, *self._silent]:
            sock.close()

    def _start(self, work: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=self._carried, args=(work, *args), daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _carried(self, work: Callable[..., None], *pair: socket.socket) -> None:
        work(*pair)
        if not pair:
            return
        with self._lock:
            self._half ^= {frozenset(pair)}
            if frozenset(pair) in self._half:
                return
            self._sockets = [sock for sock in self._sockets if sock not in pair]
        for sock in pair:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    self._silent.append(near)
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # nobody is there
                    near.close()
                    continue
                with self._lock:
                    self._sockets += [near, far]
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(self._requests, near, far)
                self._start(self._replies, far, near)

    def _requests(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                if self._is_cut or near in self._forgotten:
                    continue
                if self._word is not None and self._word in data:
                    self._word, self._kept = None, (far, data)
                    near.shutdown(socket.SHUT_RDWR)
                    return
                if not self._flowing.is_set():
                    self.held.set()
                    self._flowing.wait()
                far.sendall(data)
                if self.sip is not None and self._closed.wait(self.sip):
                    return
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)

    def _replies(self, far: socket.socket, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(65536):
                if self._is_cut or far in self._forgotten:
                    continue
                data = data.replace(*self.says) if self.says[0] else data
                if self._kept is not None and self._kept[0] is far:
                    self._answered_late.set()
                    continue
                self._answering.wait()
                if self.cuts_next:
                    self.cuts_next = False
                    break
                if self.drip is None:
                    near.sendall(data)
                    continue
                for byte in data:
                    near.sendall(bytes([byte]))
                    if self._closed.wait(self.drip):
                        return
        with contextlib.suppress(OSError):
            near.shutdown(socket.SHUT_RDWR)
