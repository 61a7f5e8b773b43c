"""Prints the results of a part of the bench, and keeps them in bench/results: tables, promises, charts."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.harness import Results, Spread


@dataclass(frozen=True)
class Promise:
    """One limit, the figure held against it, and how it came out."""

    claim: str
    figure: Spread | float
    limit: float
    at_most: bool = True
    by: str = "added CPU"

    @property
    def value(self) -> float:
        return self.figure.p50 if isinstance(self.figure, Spread) else self.figure

    @property
    def kept(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def close(self) -> bool:
        """Return whether the limit is between the quartiles: the next run may say otherwise."""
        return isinstance(self.figure, Spread) and self.figure.p25 < self.limit < self.figure.p75

    @property
    def says(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {short(self.limit)}"

    def __str__(self) -> str:
        verdict = f"{'kept  ' if self.kept else 'BROKEN'}{' (close)' if self.close else ''}"
        return f"{verdict}  {self.claim} {self.says}: {shown(self.figure)}, by {self.by}"


@dataclass
class Table:
    """Rows under column names. The first columns are text, the others figures."""

    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    left: int = 1

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns), cells
        self.rows.append(cells)

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head, *body = (self._line(row, widths) for row in lines)
        return "\n".join([head, "-" * len(head), *body])

    def _line(self, row: Iterable[str], widths: list[int]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if place < self.left else cell.rjust(width)
            for place, (cell, width) in enumerate(cells)
        ).rstrip()

    def markdown(self) -> str:
        rule = [":--" if place < self.left else "--:" for place in range(len(self.columns))]
        lines = (f"| {' | '.join(row)} |" for row in [self.columns, rule, *self.rows])
        return "\n".join(lines)


@dataclass
class Section:
    """Holds the results of one part."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: dict[str, str] = field(default_factory=dict)  # file name → SVG
    figures: dict[str, Any] = field(default_factory=dict)  # for whoever wants to draw others

    def __str__(self) -> str:
        parts = [f"--- {self.title}", *map(str, self.tables)]
        parts += ["\n".join(lines) for lines in (map(str, self.promises), self.notes)]
        return "\n\n".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """Return the section without its charts, which are files of their own."""
        about = {name: getattr(self, name) for name in ("name", "title", "notes", "figures")}
        promises = [asdict(one) | {"kept": one.kept, "close": one.close} for one in self.promises]
        tables = [{"columns": t.columns, "rows": t.rows, "left": t.left} for t in self.tables]
        return about | {"tables": tables, "promises": promises, "charts": sorted(self.charts)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        promises = []
        for one in data["promises"]:
            given = {name: one[name] for name in ("claim", "limit", "at_most", "by")}
            figure = one["figure"]
            spread = Spread(**figure) if isinstance(figure, dict) else figure
            promises.append(Promise(figure=spread, **given))
        tables = [Table(**table) for table in data["tables"]]
        charts = dict.fromkeys(data["charts"], "")
        about = {name: data[name] for name in ("name", "title", "notes", "figures")}
        return cls(tables=tables, promises=promises, charts=charts, **about)

    def markdown(self) -> str:
        parts = [f"## {self.title}", *(f"![{self.title}]({name})" for name in self.charts)]
        parts += [table.markdown() for table in self.tables]
        if self.promises:
            parts.append(_promises(self.promises))
        parts += self.notes
        return "\n\n".join(parts)


def _promises(promises: Sequence[Promise]) -> str:
    table = Table(["promise", "limit", "figure", "", "by"], left=1)
    for one in promises:
        verdict = ("kept" if one.kept else "**broken**") + (" (close)" if one.close else "")
        table.add(one.claim, one.says, shown(one.figure), verdict, one.by)
    return table.markdown()


def shown(figure: Spread | float) -> str:
    return str(figure) if isinstance(figure, Spread) else short(figure)


def short(number: float) -> str:
    """Return a number with about three digits.

    >>> short(0.5), short(2.0), short(12.345), short(40000)
    ('0.5', '2', '12.3', '40,000')
    """
    if abs(number) >= 100 or number == int(number):
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}".rstrip("0").rstrip(".")


# --- a contest --------------------------------------------------------------------------------------


def contest_table(results: Results, what: str) -> Table:
    """Return each contestant's CPU, what it adds to the raw round trip, its steps, and both beside redis-py."""
    columns = ["CPU µs", "added CPU µs", "× redis-py", "steps", "steps × redis-py", "wall µs"]
    table = Table([what, "version", *columns], left=2)
    for contestant in results.contestants:
        name = contestant.name
        bare, added = results.bare(name), Spread.of(results.added(name))
        more = added.p50 > 0 or contestant.role == "floor"  # some calls need no round trip at all
        table.add(
            name,
            contestant.version,
            str(Spread.of(results.cpu(name))),
            str(added) if more else "–",
            str(results.ratio(name, bare)) if more else "–",
            f"{results.steps[name]:,.0f}",
            f"{results.steps_ratio(name, bare):.2f}",
            f"{Spread.of(results.wall(name)).p50:.1f}",
        )
    return table


def contest_figures(results: Results) -> dict[str, Any]:
    return {
        contestant.name: {
            "kind": contestant.kind,
            "role": contestant.role,
            "version": contestant.version,
            "cpu_us": asdict(Spread.of(results.cpu(contestant.name))),
            "added_us": asdict(Spread.of(results.added(contestant.name))),
            "steps": results.steps[contestant.name],
        }
        for contestant in results.contestants
    }


HIDDEN_WORK = 0.05  # of a hit's own CPU time: above it, work in other threads is named


def contest_notes(results: Results) -> list[str]:
    """Return notes on contestants: which were skipped, which work in other threads, and how each is set up."""
    notes = [f"{name} is skipped: {why}" for name, why in results.skipped.items()]
    for contestant in results.contestants:
        hidden = Spread.of(results.elsewhere(contestant.name)).p50
        if hidden > HIDDEN_WORK * Spread.of(results.cpu(contestant.name)).p50:
            notes.append(f"{contestant.name} also spends {hidden:.1f} µs in other threads")
    notes += [f"{c.name}: {c.setup}" for c in results.contestants if c.setup]
    return notes


# --- all of it ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return the machine that the figures were measured on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "when": time.strftime("%Y-%m-%d"),
    }


def keep(section: Section, folder: Path, level: str) -> None:
    """Write a section beside those of earlier runs, and the page of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[section.name] = section.as_json() | {"machine": machine() | {"level": level}}
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, svg in section.charts.items():
        (folder / name).write_text(svg, encoding="utf-8")
    (folder / "results.md").write_text(page(known), encoding="utf-8")


def summary(folder: Path, parts: Iterable[str]) -> str:
    """Tell how many promises of these parts were kept, and which were broken."""
    known = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    promises = [one for part in parts for one in Section.from_json(known[part]).promises]
    broken = [one for one in promises if not one.kept]
    lines = [f"{len(promises) - len(broken)} promises kept, {len(broken)} broken in {folder}"]
    return "\n".join([*lines, *map(str, broken)])


def page(known: dict[str, Any]) -> str:
    """Return the sections as one page of Markdown."""
    parts = ["# What calls cost", "Written by `make bench`; bench/README.md says how to read it."]
    for data in known.values():
        about = data["machine"]
        where = f"Python {about['python']}, {about['system']}, {about['cpus']} CPUs, load {about['load']}"
        parts += [
            Section.from_json(data).markdown(),
            f"*{about['when']}, {where}, {about['level']}*",
        ]
    return "\n\n".join(parts) + "\n"
