"""A table for a width or for Markdown, with untrusted texts escaped."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Self

from tabulate import tabulate

from grpo_harness.text import escape, markdown

_LONGEST = 1000
"""Maximum of characters in a cell, in the widest table."""

STYLES = {"ERROR": "bold magenta", "FAIL": "bold red", "UNPROVEN": "yellow", "PASS": "green"}
"""How a terminal shows verdicts."""

_NAMES = (32, 24, 20, 16, 12)
"""Maximum of characters in a name: tried in turn until the table is narrow enough."""


@dataclass(frozen=True)
class Table:
    """Rows, and the columns that a narrow terminal can leave out, in that order."""

    rows: Sequence[Mapping[str, str]]
    dispensable: Sequence[str] = ()

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]], dispensable: Sequence[str] = ()) -> Self:
        """Make a table of rows by column name, with any text in them."""
        # A file name may hold half of a surrogate pair, which a column cannot.
        whole = [{_whole(name): _whole(value) for name, value in row.items()} for row in rows]
        return cls(whole, dispensable)

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return [*dict.fromkeys(name for row in self.rows for name in row)]

    def __bool__(self) -> bool:
        """Tell whether there are rows."""
        return len(self.rows) > 0

    def terminal(self, width: int, *, styled: bool = False) -> list[str]:
        """Return the lines of the table, none longer than ``width`` if that can be done.

        Columns are left out and long names are shortened; a last line says which columns. With
        ``styled`` the lines have the escape sequences of a terminal, and verdicts their colours.
        """
        for columns, longest in self._narrower():
            short = partial(_short, longest)
            lines = self._rendered(columns, "simple", short).splitlines()
            if max(map(len, lines)) <= width:
                break
        if styled:
            lines = self._styled(columns, max(map(len, lines)), short)
        if left_out := [name for name in self.columns if name not in columns]:
            said = f"({width} columns have no room for: {', '.join(left_out)})"
            lines += textwrap.wrap(said, width)
        return lines

    def markdown(self) -> str:
        """Return the whole table in Markdown."""
        return self._rendered(self.columns, "pipe", markdown)

    def _rendered(self, columns: Sequence[str], style: str, harmless: Callable[[str], str]) -> str:
        cells = [[harmless(row.get(name, "")) for name in columns] for row in self.rows]
        names = [harmless(name) for name in columns]
        return str(tabulate(cells, names, tablefmt=style, disable_numparse=True))

    def _styled(
        self, columns: Sequence[str], width: int, harmless: Callable[[str], str]
    ) -> list[str]:
        """Draw the table by rich."""
        # Imported late: only a terminal needs it.
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
            header_style="bold",
        )  # fmt: skip
        for name in columns:
            drawn.add_column(Text(harmless(name)), no_wrap=True)
        for row in self.rows:
            cells = [harmless(row.get(name, "")) for name in columns]
            drawn.add_row(*(Text(cell, STYLES.get(cell.split(":")[0], "")) for cell in cells))
        console = Console(
            file=StringIO(), width=width + 1, force_terminal=True, color_system="standard",
            legacy_windows=False,
        )  # fmt: skip
        with console.capture() as found:
            console.print(drawn)
        return [line.rstrip() for line in found.get().splitlines()]

    def _narrower(self) -> Iterator[tuple[list[str], int]]:
        """Yield the columns to show and the longest name, from all to the fewest."""
        columns = self.columns
        yield columns, _LONGEST
        for name in self.dispensable:
            columns = [column for column in columns if column != name]
            yield columns, _LONGEST
        for longest in _NAMES:
            yield columns, longest


def _whole(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _short(longest: int, text: str) -> str:
    """Escape a text, and keep the beginning and the end of a long one."""
    shown, half = escape(text, _LONGEST), (longest - 1) // 2
    return shown if len(shown) <= longest else f"{shown[:half]}…{shown[-half:]}"
