"""Pages whose figures are those on record: tables between marks, and numbers that link to a row.

A table stands between two comments, of which the first says what is in it:

    <!-- bench masking; rows: clients=10|100, graph=complete; columns: client_ms server_ms -->
    <!-- end of bench -->

A number in the text is a link to its row: a path ending in ``FILE.json#WHERE:FIGURE``. WHERE is
``key=value&key=value`` (URL-encoded), of the row or of its case; FIGURE a key of the row or its
figures, by dots, and ``*`` or ``/`` with a factor. ``[25 ms](results/masking.json#clients=100&
values=8192:client_ms)`` is right if the figure, rounded to as many digits as are shown, is 25.
A median, or an estimate, stands for a figure that has a range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from secure_fedprompt.bench import book, peers
from secure_fedprompt.bench.chapter import Chapter, Row
from secure_fedprompt.bench.compare import spread
from secure_fedprompt.protocol.errors import ConfigError

BEGIN = re.compile(r"<!-- bench ([\w-]+)((?:; \w+: [^;>]*)*) -->\n")
END = "<!-- end of bench -->"
LINK = re.compile(r"\[([^\]\[]+)\]\(([^)#\s]+\.json)#([^)\s]+)\)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FACTOR = re.compile(r"([*/])([\d.e-]+)$")
NO_FIGURE = LookupError, OSError, TypeError, ValueError
CENTRES = ("median", "value", "mean")


def table(made: Chapter, rows: Sequence[Row], words: str = "") -> str:
    """Rows of a chapter as Markdown: medians with their range.

    Args:
        words: of the mark: "; rows: ...", "; keys: ..." and "; columns: ..." leave others out.
    """
    options = dict(part.split(": ", 1) for part in words.split("; ") if part)
    chosen = [row for row in rows if _matches(row, options.get("rows", ""))]
    keys = options["keys"].split() if "keys" in options else [
        k for k in made.keys if len({str(row["case"].get(k)) for row in chosen}) > 1]  # fmt: skip
    wanted = options.get("columns", "").split() or [c.key for c in made.columns]
    by_key = {column.key: column for column in made.columns}
    columns = [by_key[key] for key in wanted]
    several = len({row["by"] for row in chosen}) > 1
    head = [*(made.keys[k] for k in keys), *(["system"] if several else []),
            *(column.heading for column in columns)]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in chosen:
        cells = [_cell(row["case"].get(k, "")) for k in keys]
        if several:
            label = peers.PEERS[row["by"]].label if row["by"] in peers.PEERS else row["by"]
            cells.append(f"{label} {row['version'].split()[-1]}" if row.get("version") else label)
        cells += [spread(row["figures"][c.key], c.digits) if c.key in row["figures"] else ""
                  for c in columns]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _matches(row: Row, words: str) -> bool:
    for part in filter(None, words.split(", ")):
        key, _, values = part.partition("=")
        if str(row["by"] if key == "by" else row["case"].get(key)) not in values.split("|"):
            return False
    return True


def written(text: str, results: Path) -> str:
    """A page with its tables as the figures on record have them.

    Raises:
        ConfigError: a table has no end, or nothing is on record of its chapter.
    """

    def filled(match: re.Match[str]) -> str:
        made = book.chapter(match[1])
        rows = book.read(results / f"{made.name}.json")["rows"]
        mark = match[0].partition("\n")[0]
        return f"{mark}\n\n{table(made, rows, match[2].removeprefix('; '))}\n{END}"

    parts = BEGIN.split(text)
    if text.count(END) != len(parts) // 3:
        raise ConfigError(f"a page has {len(parts) // 3} tables and {text.count(END)} ends of them")
    return re.sub(BEGIN.pattern + r".*?" + re.escape(END), filled, text, flags=re.DOTALL)


def wrong(page: Path) -> list[str]:
    """Linked numbers that are not what their row says, a line each."""
    found = []
    for words, path, where in links(page.read_text()):
        try:
            value = looked_up(page.parent / path, where)
        except NO_FIGURE as error:
            found.append(f"{page.name}: [{words}]({path}#{where}): {error}")
            continue
        if not agrees(words, value):
            found.append(f"{page.name}: [{words}]({path}#{where}): the row has {value:.6g}")
    return found


def renewed(page: Path) -> str:
    """The page with each linked number as its row has it, with as many decimals as it had.

    Raises:
        ConfigError: a link names no figure.
    """

    def number(match: re.Match[str]) -> str:
        words, path, where = match.groups()
        said = NUMBER.search(words)
        if said is None:
            return match[0]
        try:
            value = looked_up(page.parent / path, where)
        except NO_FIGURE as error:
            raise ConfigError(f"{page.name}: [{words}]({path}#{where}): {error}") from None
        if agrees(words, value):
            return match[0]
        decimals = len(said[0].partition(".")[2])
        words = f"{words[: said.start()]}{value:,.{decimals}f}{words[said.end() :]}"
        return f"[{words}]({path}#{where})"

    return LINK.sub(number, page.read_text())


def links(text: str) -> Iterator[tuple[str, str, str]]:
    """Numbers that link to rows, as (words, path, fragment)."""
    for match in LINK.finditer(text):
        yield match[1], match[2], match[3]


def looked_up(path: Path, fragment: str) -> float:
    """The figure that a link names.

    Raises:
        LookupError: no row, or several, or none of that name.
    """
    content, (where, _, figure) = json.loads(path.read_text()), fragment.rpartition(":")
    found: Any = content
    if where:
        wanted = dict(part.split("=", 1) for part in unquote(where).split("&"))
        rows = [row for row in _rows(content) if _has(row, wanted)]
        if len(rows) != 1:
            raise LookupError(f"{len(rows)} rows match")
        found = {**rows[0], **rows[0].get("figures", {})}
    factor = FACTOR.search(figure)
    for name in figure[: factor.start() if factor else None].split("."):
        found = found[int(name)] if isinstance(found, list) else found[name]
    if isinstance(found, dict):
        found = next(found[name] for name in CENTRES if name in found)
    value = float(found)
    if factor is None:
        return value
    return value * float(factor[2]) if factor[1] == "*" else value / float(factor[2])


def _rows(content: Any) -> list[dict[str, Any]]:
    rows = content["rows"]
    return [{"name": k, **v} for k, v in rows.items()] if isinstance(rows, dict) else rows


def _has(row: dict[str, Any], wanted: dict[str, str]) -> bool:
    """Numbers are the same however they are written."""
    own = {**row, **row.get("case", {})}
    same: Callable[[Any, str], bool] = lambda a, b: (  # noqa: E731
        float(a) == float(b) if isinstance(a, int | float) else str(a) == b
    )
    return all(key in own and same(own[key], value) for key, value in wanted.items())


def agrees(words: str, value: float) -> bool:
    """Whether the first number in the words is this value, rounded to as many decimals."""
    match = NUMBER.search(words)
    if match is None:
        return False
    said = match[0].replace(",", "")
    decimals = len(said.partition(".")[2])
    return abs(float(said) - value) <= 0.5001 * 10.0**-decimals
