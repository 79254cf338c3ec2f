"""The table family x tuner x property, filled by what the tests of this folder found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Found = Literal["yes", "NO", "none"]
SIGNS: dict[Found, str] = {"yes": "yes", "NO": "NO", "none": "-"}
EMPTY = "....."


@dataclass
class Table:
    """One cell per family, tuner and column. `none`: it cannot be; its test was skipped, and said why."""

    rows: list[tuple[str, str]]
    columns: list[str]
    cells: dict[tuple[str, str, str], Found] = field(default_factory=dict)
    reasons: dict[str, set[str]] = field(default_factory=dict)

    def record(self, family: str, tuner: str, column: str, outcome: str, reason: str = "") -> None:
        """Several tests may fill a cell: it holds when all of them pass."""
        key = (family, tuner, column)
        found: Found = "NO" if outcome == "failed" else "none" if outcome == "skipped" else "yes"
        if self.cells.get(key) != "NO" and not (found == "none" and key in self.cells):
            self.cells[key] = found
        if found == "none":
            self.reasons.setdefault(column, set()).add(reason)

    def empty(self) -> list[tuple[str, str, str]]:
        """Cells that no test has filled."""
        every = ((*row, column) for row in self.rows for column in self.columns)
        return [key for key in every if key not in self.cells]

    def lines(self) -> Iterable[str]:
        """For the terminal: columns by number, then a line per family and tuner."""
        for number, column in enumerate(self.columns, 1):
            yield f"  {number:2d}  {column}"
        tuners = max(len(tuner) for _, tuner in self.rows)
        families = max(len(family) for family, _ in self.rows)
        yield " ".join(
            [" " * (families + tuners + 2), *(f"{n:>5d}" for n in range(1, len(self.columns) + 1))]
        )
        for family, tuner in self.rows:
            signs = [self._sign((family, tuner, column)) for column in self.columns]
            yield " ".join([f"{family:{families}s}  {tuner:{tuners}s}", *(f"{sign:>5s}" for sign in signs)])
        for column, reasons in self.reasons.items():
            for reason in sorted(reasons):
                yield f"  -  {column}: {reason}"

    def _sign(self, key: tuple[str, str, str]) -> str:
        return SIGNS[self.cells[key]] if key in self.cells else EMPTY
