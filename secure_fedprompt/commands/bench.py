"""``secure-fedprompt bench``: every figure that this project claims, measured again."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import ConfigError

FAILED, WORSE = 1, 1
OUT = "bench-results"
Say = Callable[[str], None]


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything counts its threads
    parser = command.parser(
        "secure-fedprompt bench",
        "Measure what the documentation claims, chapter by chapter: medians with their range, the "
        "machine, versions, and what else ran. Figures go to a JSON file a chapter as they come; "
        "started again, it goes on. A page of all tables, and curves if matplotlib is there, are "
        "written at the end.",
        "  secure-fedprompt bench --quick                   # under five minutes on two cores\n"
        "  secure-fedprompt bench --list\n"
        "  secure-fedprompt bench --only masking,selection\n"
        "  secure-fedprompt bench --quick --compare         # what got worse; then it ends with 1\n"
        "  secure-fedprompt bench --peers peer-venvs        # beside Flower, NVFlare and others\n"
        "  # from a clone: all figures, and the tables of docs and README from them\n"
        "  secure-fedprompt bench --out benchmarks/results --peers peer-venvs --write\n"
        "  secure-fedprompt bench --only none --scripts labels_generated --out benchmarks/results",
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few repetitions")
    parser.add_argument("--only", default="", metavar="NAMES",
                        help="of chapters, with commas; none: no chapter")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="what there is, and stop")
    parser.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR",
                        help=f"of the figures (default {OUT})")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=0, metavar="N",
                        help="repetitions of each case (default: a chapter's own)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also what is on record already")
    parser.add_argument("--peers", type=Path, metavar="DIR",
                        help="other systems as well; DIR holds their environments")  # fmt: skip
    parser.add_argument(
        "--compare", nargs="?", type=Path, const=Path(), metavar="DIR",
        help="name what is worse than the figures there, by more than the spread (default: the "
        "repository's)",
    )  # fmt: skip
    parser.add_argument("--scripts", default="", metavar="NAMES",
                        help="long experiments of the repository, or all")  # fmt: skip
    parser.add_argument(
        "--photos", type=Path, metavar="DIR",
        help="what some of them want: data sets and CLIPs, by the names that --list shows",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true",
                        help="bring the repository's pages up to date")  # fmt: skip
    args = parser.parse_args(argv)
    return command.guard(lambda: run(args), args)


def run(args: argparse.Namespace) -> int:
    """Measure, write, compare.

    Raises:
        ConfigError: a flag is wrong.
    """
    from secure_fedprompt.bench import runner, scripts

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    names = [] if args.only == "none" else runner.names_of(args.only)
    asked = scripts.chosen(args.scripts)
    if args.repeat < 0:
        raise ConfigError(f"--repeat {args.repeat}: at least 1, or 0 for a chapter's own")
    if args.list:
        listed(say)
        return 0
    before = _before(args.compare, names)
    if args.quick:
        say("the quick cases take two to three minutes on two cores")
    work = runner.Runner(args.out, args.quick, args.repeat, args.peers, args.again, say)
    failed = work.run(names)
    failed += scripts.Running(args.out, args.photos, args.again, say).run(asked)
    page, drawn = finish(args.out)
    say(f"figures in {args.out}, all tables in {page}")
    if not drawn:
        say("curves were not drawn: that takes matplotlib (pip install matplotlib)")
    if args.write:
        for path in write_pages(args.out):
            say(f"written: {path}")
    worse = compared(before, args.out, say)
    for text in failed:
        say(f"FAILED: {text}")
    command.write_json(args.json, "bench", {
        "out": str(args.out), "chapters": names, "failed": failed, "worse": worse,
    })  # fmt: skip
    return FAILED if failed or worse else 0


def listed(say: Say) -> None:
    """Chapters with their cases, and scripts with their hours."""
    from secure_fedprompt.bench import book, scripts

    for name in book.MODULES:
        made = book.chapter(name)
        more = f"; beside {', '.join(made.peers)}" if made.peers else ""
        quick, full = len(made.cases(True)), len(made.cases(False))
        say(f"{name:11} {made.title}: {quick} quick cases, {full} in all{more}")
    for script in scripts.table().values():
        photos = f", on {' with '.join(script.photos)}" if script.photos else ""
        say(f"{script.name:30} script, about {60 * script.hours:.0f} min{photos}")


def _before(folder: Path | None, names: list[str]) -> dict[str, dict[str, Any]]:
    """The older figures, by chapter: read before anything is measured, perhaps in their place.

    Raises:
        ConfigError: there are none.
    """
    from secure_fedprompt.bench import book

    if folder is None:
        return {}
    if folder == Path():
        found = book.benchmarks()
        if found is None:
            raise ConfigError("--compare: give a folder; only the repository has figures")
        folder = found / "results"
    if not folder.is_dir():
        raise ConfigError(f"--compare {folder}: no such folder")
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: book.read(path) if path.exists() else {} for name, path in paths.items()}


def finish(out: Path) -> tuple[Path, bool]:
    """Fits, curves, and a page of all that is on record; its path, and whether all is drawn."""
    from secure_fedprompt.bench import book, curves, pages, peers, primitives

    known: Mapping[str, float] = {}
    parts, complete = ["# Figures\n"], True
    path = out / "primitives.json"
    if path.exists():
        known = primitives.known(book.read(path)["rows"])
    for name in [name for name in book.MODULES if (out / f"{name}.json").exists()]:
        made = book.chapter(name)
        record = book.Record(out, made)
        found = [curves.fit(curve, record.rows, known) for curve in made.curves]
        record.content["fits"] = [one for one in found if one]
        record.write()
        drawn = curves.draw(made, record.content, out / f"{name}.svg")
        complete &= drawn or not record.content["fits"]
        parts += [f"## {made.title}\n", f"```\n{made.about.strip()}\n```\n",
                  pages.table(made, record.rows)]  # fmt: skip
        parts += [f"- {one['curve']}: {one['y']} grows as {one['x']}^{one['exponent']:.2f} "
                  f"(± {one['error']:.2f})" for one in record.content["fits"]]  # fmt: skip
        parts += [f"\n![curves]({name}.svg)\n"] if drawn else [""]
        others = [peers.PEERS[by] for by in sorted({r["by"] for r in record.rows} - {book.OURS})]
        parts += [f"{peer.label} leaves out: {peer.lacks}.\n" for peer in others if peer.lacks]
        about = record.content["machines"].values()
        parts += [f"Measured on: {x['processor']}, {x['cores']} cores, Python {x['python']}.\n"
                  for x in about]  # fmt: skip
        busy = [row["others"] for row in record.rows if row["others"] is not None]
        if busy:
            parts.append(f"Others used {statistics.median(busy):.2f} cores meanwhile, at most "
                         f"{max(busy):.2f}.\n")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    page = out / "book.md"
    page.write_text("\n".join(parts))
    return page, complete


def write_pages(out: Path) -> list[Path]:
    """Bring tables of the repository's pages up to date; those that changed.

    Raises:
        ConfigError: this is no clone, or its pages' links lead to other figures.
    """
    from secure_fedprompt.bench import book, pages

    folder = book.benchmarks()
    if folder is None:
        raise ConfigError("--write: the pages are in the repository, not in the package")
    if out.resolve() != folder / "results":
        raise ConfigError(f"--write: --out {out} is not {folder / 'results'}, where links lead")
    subprocess.run([sys.executable, str(folder / "privacy" / "summary.py")], check=True)
    changed = []
    for path in [book.CHECKOUT / "README.md", *sorted((book.CHECKOUT / "docs").rglob("*.md"))]:
        text = path.read_text()
        path.write_text(pages.written(text, out))
        path.write_text(new := pages.renewed(path))
        if new != text:
            changed.append(path)
    return changed


def compared(before: dict[str, dict[str, Any]], out: Path, say: Say) -> list[str]:
    """Say what got worse and better; what got worse."""
    from secure_fedprompt.bench import book, compare

    worse = []
    for name, old in before.items():
        made, path = book.chapter(name), out / f"{name}.json"
        if not old or not path.exists():
            say(f"{name}: nothing to compare with")
            continue
        now = book.read(path)
        bad, good = compare.compare(made, old, now)
        if not compare.machines(old, now):
            say(f"{name}: not the same machine as before; seconds say little")
        for text in bad:
            say(f"WORSE: {text}")
        for text in good:
            say(f"better: {text}")
        if not bad and not good:
            say(f"{name}: the same, within the spread")
        worse += bad
    return worse
