"""The table of protections, held against a copy that does not import it, and used everywhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from rounds import make_plan

from secure_fedprompt.protocol.errors import PlanError
from secure_fedprompt.protocol.protections import PROTECTIONS, facts_of
from secure_fedprompt.show import what_the_server_saw

ROOT = Path(__file__).parent.parent
#               hides  masked encrypted approximate default
ROWS = {
    "masks": (True, True, False, False, True),
    "bfv": (True, False, True, False, False),
    "ckks": (True, False, True, True, False),
    "none": (False, False, False, False, False),
}
MAY = (
    "protocol/protections.py",
    "clients/rounds/start.py",
    "server/rounds/start.py",
    "secure_fedprompt/audit/",
)


def test_the_rows_are_these() -> None:
    found = {
        name: (row.hides, row.masked, row.encrypted, row.approximate, row.default)
        for name, row in PROTECTIONS.items()
    }
    assert found == ROWS
    assert all(row.name == name for name, row in PROTECTIONS.items())


@pytest.mark.parametrize(
    ("name", "n", "t", "least", "c"),
    [("masks", 4, 3, 3, 1), ("masks", 10, 7, 7, 3), ("masks", 100, 67, 67, 33),
     ("masks", 5, 5, 4, 3), ("bfv", 4, 3, 3, 1), ("ckks", 10, 7, 7, 5), ("none", 9, 1, 1, 0)],
)  # fmt: skip
def test_quorums_and_colluders_are_the_readmes(
    name: str, n: int, t: int, least: int, c: int
) -> None:
    row = PROTECTIONS[name]
    assert (row.least(n), row.tolerated(False, n, t)) == (least, c)
    if name == "masks":
        assert (
            f"{n} clients, t = {t}; safe against a dishonest server with c = {c}"
            in row.standing(n, t, False)
        )
        assert (
            row.standing(n, t, True)
            == "masks on a k-regular graph: safe against an honest-but-curious server"
        )
    if row.encrypted:
        assert f"among themselves, {c} clients learn no more than sums" in row.standing(n, t, False)


def test_what_the_server_saw_is_what_the_readme_says() -> None:
    assert PROTECTIONS["none"].seen(3, 4).startswith("the server saw every client's update")
    for name in ("bfv", "ckks"):
        assert "could read neither them nor any client's update" in PROTECTIONS[name].seen(3, 4)
    assert (
        PROTECTIONS["masks"].seen(3, 4).startswith("the server saw 3 sums over at least 4 clients")
    )


@pytest.mark.parametrize(
    ("protection", "dropped", "says"),
    [("masks", [{}, {}], ""), ("masks", [{}, {"bob": "training"}], "but bob was in one of two"),
     ("masks", [{"dave": "x", "bob": "x"}, {}], "but bob, dave were in one of two"),
     ("masks", [{"bob": "x"}, {"bob": "x"}], ""), ("bfv", [{}, {"bob": "training"}], "")],
)  # fmt: skip
def test_who_missed_one_of_two_sums_is_said(
    protection: str, dropped: list[dict[str, str]], says: str
) -> None:
    rows = [
        {"learning_round": n + 1, "outcome": "done", "cohort": ["alice", "bob", "carol", "dave"],
         "dropped": gone}
        for n, gone in enumerate([*dropped, {}])
    ]  # fmt: skip
    summary = {"protection": protection, "learning_rounds": 2, "rounds": rows}
    shown = what_the_server_saw(summary)
    assert says in shown
    assert ("successive sums" in shown) == bool(says)


def test_a_made_up_name_promises_most_and_can_do_nothing() -> None:
    row = facts_of("rot13")
    assert (row.hides, row.masked, row.encrypted, row.default) == (True, False, False, False)


def test_nobody_else_tells_protections_apart_by_name() -> None:
    """Comparisons, membership tests and patterns with a protection's name."""
    names, found = set(ROWS), []
    sources = [
        path
        for folder in ("secure_fedprompt", "protocol", "clients", "server")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.relative_to(ROOT).as_posix().startswith(MAY)
    ]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare | ast.MatchValue):
                continue
            said = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            text = ast.unparse(node)
            if said & (names - {"none"}) or (said & {"none"} and re.search(r"protection", text)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
            if "SCHEMES" in text:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert len(sources) > 100
    assert found == []


def test_a_made_up_method_is_let_into_no_protected_sum() -> None:
    """Nothing is known of what its sums would tell."""
    with pytest.raises(PlanError, match="method rot13 shows every client's prompt to the others"):
        make_plan(4, method="rot13").check()
    make_plan(4).check()
