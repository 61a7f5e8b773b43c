"""`python -m bench [part …] [--quick | --full]`: measure parts, each in a process of its own, and keep the results.

The results of a quick run are for whoever runs it. Those of others are what README and docs show.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from bench.report import keep, summary
from bench.stage import EFFORTS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PARTS = [
    "hits",
    "stale",
    "near",
    "sessions",
    "limits",
    "server",
    "nodes",
    "abuse",
    "abuse_day",
    "requests",
    "health",
    "invalidation",
    "refreshes",
    "page",
    "growth",
    "away",
]


def main() -> int:
    options = arguments()
    if options.alone:
        run_part(options.alone, options.level, options.out)
        return 0
    parts = options.parts or PARTS
    failed = [part for part in parts if not run_apart(part, options)]
    if failed:
        print(f"failed: {', '.join(failed)}")
    else:
        print(summary(options.out, parts))
    return len(failed)


def run_apart(part: str, options: argparse.Namespace) -> bool:
    """Run a part in a process of its own: several configure what a process has only one of, such as Django."""
    began = time.monotonic()
    words = [sys.executable, "-m", "bench", "--alone", part, "--level", options.level]
    done = subprocess.run([*words, "--out", options.out], cwd=ROOT, check=False)
    print(f"({part}: {time.monotonic() - began:.0f} s)\n", flush=True)
    return done.returncode == 0


def run_part(part: str, level: str, out: Path) -> None:
    # The peers still call names that redis-py deprecates; that is not our news to print.
    warnings.simplefilter("ignore", DeprecationWarning)
    logging.getLogger("stillroom").setLevel(logging.CRITICAL)  # some parts take Redis away
    try:
        section = importlib.import_module(f"bench.{part}").run(EFFORTS[level])
    except pytest.skip.Exception as lacking:  # a server of the tests that can't be had here
        print(f"--- {part} is not measured: {lacking}", flush=True)
        return
    print(section, flush=True)
    keep(section, out, level)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What calls cost.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", dest="level", action="store_const", const="quick")
    parser.add_argument("--full", dest="level", action="store_const", const="full")
    parser.add_argument("--level", choices=EFFORTS, help=argparse.SUPPRESS)
    parser.set_defaults(level="usual")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: bench/results; artefacts/bench if quick")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.out is None:
        brief = options.level in ("smoke", "quick")
        options.out = ROOT / "artefacts" / "bench" if brief else RESULTS
    return options


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
