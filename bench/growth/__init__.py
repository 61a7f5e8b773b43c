"""Measures how cost grows with invalidations, processes, marks, keys, tags, sessions, clients and value size.

A figure in a chart is a ratio to a plain command of redis-py in the same round, or the server's own count. What
bends is what a bigger app meets first.
"""

from __future__ import annotations

from bench.growth import caches, fleets, invalidations, states
from bench.report import Section
from bench.stage import Effort

CURVES = [
    invalidations.rate,
    invalidations.marks,
    fleets.processes,
    caches.keys,
    caches.tags,
    caches.value_size,
    states.sessions,
    states.sessions_of_a_user,
    states.clients,
]


def run(effort: Effort) -> Section:
    section = Section("growth", "How cost grows")
    for curve in CURVES:
        curve(effort, section)
    return section
