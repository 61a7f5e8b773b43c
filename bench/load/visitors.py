"""Defines what visitors do: they look at products, and now and then at the list. Run by Locust."""

from __future__ import annotations

import os
import random

from locust import FastHttpUser, constant_throughput, task


class Visitor(FastHttpUser):
    wait_time = constant_throughput(float(os.environ["LOAD_EACH"]))

    @task(7)
    def look_at_a_product(self) -> None:
        self._get(f"/product/{random.randint(1, 7)}")

    @task(1)
    def look_at_the_list(self) -> None:
        self._get("/")

    def _get(self, path: str) -> None:
        """Send a request from a new random address: the shop counts each page, and refuses none."""
        address = ".".join(str(random.randint(1, 254)) for _ in range(3))
        self.client.get(path, headers={"X-Forwarded-For": f"100.{address}"})
