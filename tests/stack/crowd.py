"""The shop's customers: many at once, in a container on Traefik's network, behaving as Traefik does.

`python crowd.py SECONDS PRODUCTS AT_ONCE` prints one JSON object at the end; an order is of AT_ONCE products. A
request that reaches nobody goes to the next container, three times; everything else is an answer. It runs inside
the stack's image, so: standard library only.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

WEB, PORT = "web", 8000
ATTEMPTS = 4
CUSTOMERS = 8
THINKS = 0.4  # seconds between two turns of a customer: the machine has more to do than to answer
# Seconds: what a worker held when it died is due again after 60, and beat looks every 15.
PATIENCE = 110.0


def addresses() -> list[str]:
    try:
        found = {info[4][0] for info in socket.getaddrinfo(WEB, PORT, type=socket.SOCK_STREAM)}
    except socket.gaierror:  # for a moment nobody is healthy
        found = set()
    return random.sample(sorted(found), len(found))


def ask(method: str, path: str, headers: Mapping[str, str] = {}) -> tuple[int, Any]:
    """Ask for a page; return (status, body), or (0, reason) if no container could be reached."""
    why = "nobody"
    for attempt in range(ATTEMPTS):
        for address in addresses():
            try:
                connection = http.client.HTTPConnection(address, PORT, timeout=5)
                connection.request(method, path, headers=dict(headers))
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read())
            except (OSError, http.client.HTTPException) as error:
                why = repr(error)
            finally:
                connection.close()
        time.sleep(0.2 * (attempt + 1))
    return 0, why


class Customer(threading.Thread):
    """A customer who looks at pages, orders changes, stays logged in, and remembers what was promised."""

    def __init__(self, until: float, products: list[int], at_once: int) -> None:
        super().__init__()
        self._until, self._products, self._at_once = until, products, at_once
        self.answers: Counter[str] = Counter()
        self.promised: dict[
            int, float
        ] = {}  # product → when the last change of it was acknowledged
        self.changes = 0  # acknowledged, one per product
        self.token = ""

    def run(self) -> None:
        while time.time() < self._until:
            self._turn(random.choice(self._products))
            time.sleep(THINKS)

    def _turn(self, product: int) -> None:
        self._count("product", *ask("GET", f"/product/{product}"))
        self._count("stock", *ask("GET", f"/stock/{product}"))
        began, last = time.time(), product + self._at_once - 1
        if self._count("order", *ask("POST", f"/order/{product}-{last}")) == 202:
            self.changes += self._at_once
            self.promised |= dict.fromkeys(range(product, last + 1), began)
        if not self.token:
            status, token = ask("POST", "/login")
            self._count("login", status, token)
            self.token = token if status == 201 else ""
        else:
            self._count("me", *ask("GET", "/me", {"X-Session": self.token}))

    def _count(self, page: str, status: int, body: Any) -> int:
        self.answers[f"{page} {status}" if status else f"{page} failed: {body}"] += 1
        return status


def broken(promised: dict[int, float]) -> list[int]:
    """Return the products whose page is still the one from before the change at the end."""
    deadline = time.time() + PATIENCE
    left = dict(promised)
    while left and time.time() < deadline:
        for product, at in list(left.items()):
            status, page = ask("GET", f"/product/{product}")
            if status == 200 and page["loaded"] >= at:
                del left[product]
        time.sleep(0.5)
    return sorted(left)


def is_logged_out(token: str) -> bool:
    """Return whether the customer is logged out; a 503 of a busy machine does not say so."""
    deadline = time.time() + PATIENCE
    while (status := ask("GET", "/me", {"X-Session": token})[0]) == 503 and time.time() < deadline:
        time.sleep(0.5)
    return status != 200


def main(seconds: float, products: int, at_once: int) -> None:
    until, firsts = time.time() + seconds, range(0, products, at_once)
    customers = [Customer(until, list(firsts[n::CUSTOMERS]), at_once) for n in range(CUSTOMERS)]
    for customer in customers:
        customer.start()
    for customer in customers:
        customer.join()
    promised = {product: at for one in customers for product, at in one.promised.items()}
    answers = sum((one.answers for one in customers), Counter())
    tokens = [one.token for one in customers if one.token]
    report = {
        "changes": sum(one.changes for one in customers),
        "answers": answers,
        "promised": len(promised),
        "broken": broken(promised),
        "logged out": sum(map(is_logged_out, tokens)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
