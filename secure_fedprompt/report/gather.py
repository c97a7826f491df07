"""What a report shows, read from the files of a run."""

from __future__ import annotations

import bisect
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from secure_fedprompt import show
from secure_fedprompt.audit import summary
from secure_fedprompt.audit.log import Log
from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.protections import Protection, facts_of, tolerated_colluders
from secure_fedprompt.server.store import TROUBLE, open_run, rounds_of, settings_of

Rows = list[dict[str, Any]]
MOST_NAMES = 12  # in one sentence


@dataclass(frozen=True)
class Report:
    """A run, ready to be shown; lists go by ``labels``, one per attempted round.

    Attributes:
        accuracy: at the start of each round, where it is known; zero_shot: what to compare with.
        traffic: "up" or "down" -> message type -> bytes.
        seconds: stage -> seconds.
        dropouts: round, who, what.
        spent: sentences about differential privacy.
    """

    run: str
    method: str
    protection: str
    subtitle: str
    labels: list[str]
    facts: dict[str, str]
    learned: list[str]
    accuracy: list[float | None]
    zero_shot: float | None
    traffic: dict[str, dict[str, list[float]]]
    seconds: dict[str, list[float]]
    dropouts: list[tuple[str, str, str]]
    spent: list[str]
    audit: summary.Audit | None

    @property
    def marks(self) -> list[str]:
        """The labels, short enough for a chart."""
        return [label.replace(" (aborted)", "\N{MULTIPLICATION SIGN}") for label in self.labels]


def gather(
    folder: Path, peers: Sequence[Path], clients: Sequence[Path], client_json: Path | None
) -> Report:
    """Read a server's run folder.

    Args:
        peers: logs of other ends; clients: state folders with a ledger of DP-SGD.
        client_json: a client's ``--json``, with the metrics that clients opened.

    Raises:
        ConfigError: it is no run folder, or holds no round yet.
    """
    with open_run(folder) as db:
        rows = rounds_of(db)
        moved = db.execute("SELECT round, direction, type, SUM(bytes) FROM traffic "
                           "GROUP BY 1, 2, 3").fetchall()  # fmt: skip
        state = db.execute("SELECT body FROM state").fetchone()
        events = db.execute("SELECT at, kind, text FROM events ORDER BY rowid").fetchall()
    if not rows or state is None:
        raise ConfigError(f"{folder} holds no round yet: wait for the first one to end")
    settings = settings_of(folder)
    run = json.loads(state[0])["run"]
    summed = {
        "rounds": rows, "protection": settings["protection"],
        "learning_rounds": settings["rounds"],
    }  # fmt: skip
    if client_json is not None:
        show.add_history(summed, _history(client_json))
    log = _audit_log(folder)
    plans = [plan for (of, _), plan in (log.plans if log else {}).items() if of == run]
    found = None
    if log is not None and run in log.runs:
        found = summary.audit(log, [Log.read(peer) for peer in peers], run, None)
    numbers = [row["round"] for row in rows]
    return Report(
        run=run,
        method=settings["method"],
        protection=settings["protection"],
        subtitle=f"{folder.resolve().name}, {_when(rows[0]['at'])} to {_when(rows[-1]['at'])}",
        labels=[_label(row, settings["rounds"]) for row in rows],
        facts=_facts(settings, rows),
        learned=_learned(settings, summed, plans, rows),
        accuracy=[row["metrics"].get("accuracy") for row in rows],
        zero_shot=next((z for r in rows if (z := r["metrics"].get("zero_shot")) is not None), None),
        traffic=_traffic(moved, numbers),
        seconds=_seconds(rows),
        dropouts=_dropouts(rows, settings["rounds"], events),
        spent=_spent(plans, clients),
        audit=found,
    )


def _history(path: Path) -> dict[str, dict[str, float]]:
    try:
        form = dict[str, dict[str, Annotated[float, Meta(ge=0, le=1e12)]]]
        history = msgspec.convert(msgspec.json.decode(path.read_bytes())["opened"], form)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--client-json {path}: not what a client's --json writes ({error})"
        ) from None
    return history


def _audit_log(folder: Path) -> Log | None:
    try:
        return Log.read(folder)
    except ConfigError:
        return None


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _label(row: dict[str, Any], rounds: int) -> str:
    label = str(row["learning_round"]) if row["learning_round"] <= rounds else "final"
    return label if row["outcome"] == "done" else f"{label} (aborted)"


def _facts(settings: dict[str, Any], rows: Rows) -> dict[str, str]:
    cohorts = sorted({len(row["cohort"]) for row in rows})
    done = sum(row["outcome"] == "done" for row in rows)
    chosen = settings["selection"]
    return {
        "method": settings["method"],
        "protection": settings["protection"],
        "selection": chosen if chosen == "client" else f"{chosen}, {settings['selection_scope']}",
        "clients": " to ".join(str(n) for n in (cohorts[0], cohorts[-1])[: len(cohorts)]),
        "sums": f"{done} opened in {settings['rounds']} learning rounds wanted, "
        f"{len(rows) - done} attempts aborted",
        "local training": f"lr {settings['lr']:g}, batch {settings['batch_size']}, "
        f"{settings['epochs']} epochs, weights {settings['weights']}",
    }


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _learned(
    settings: dict[str, Any], summed: dict[str, Any], plans: list[RoundPlan], rows: Rows
) -> list[str]:
    """The run's row of "who learns what", with its numbers."""
    facts = facts_of(settings["protection"])
    found = [_sentence(show.what_the_server_saw(summed))]
    learned = "the sums that it was in, and with them " if facts.keyed else ""
    found.append(
        f"Every client learned {learned}the global prompt, and the server who took part and when."
    )
    found.append(_verified(rows, settings["rounds"], facts))
    if facts.masked:
        pairs = {(len(p.cohort), p.threshold) for p in plans if not p.degree}
        for n, t in sorted(pairs):
            found.append(
                f"{n} clients, t = {t}: this holds against a dishonest server that colludes with "
                f"up to {tolerated_colluders(n, t)} clients."
            )
        if settings["graph"] == "regular":
            found.append("On the k-regular graph it holds against an honest-but-curious server.")
    if facts.encrypted:
        found.append(
            "Every client holds the key that opens every upload: this holds while no client "
            "colludes with the server."
        )
    if settings["selection"] == "secure":
        helpers = sorted({p.selection.helper for p in plans if p.selecting})
        found.append(
            "Neither the server nor the helper "
            + (f"({', '.join(helpers)}) " if helpers else "")
            + "could read a score or a choice; together they could."
        )
    smallest = min((len(r["cohort"]) - len(r["dropped"]) for r in rows if r["outcome"] == "done"),
                   default=0)  # fmt: skip
    if facts.masked and settings["metrics"] == "rounds" and smallest:
        found.append(
            f"Sums over {smallest} or more clients, counts and metrics included, were opened; two "
            "sums that differ by one client can be subtracted."
        )
    return found


def _verified(rows: Rows, rounds: int, facts: Protection) -> str:
    """Who has checked which sums."""
    done = [row for row in rows if row["outcome"] == "done"]
    if not facts.keyed:
        return "Sums verified by: nobody, clients have the server's word for them."
    parts = []
    for names, group in itertools.groupby(done, lambda row: row["checked"]):
        labels = [_label(row, rounds) for row in group]
        many = f"{len(names)} clients" if len(names) > MOST_NAMES else ", ".join(names)
        which = labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"
        parts.append(f"{many or 'not on record, no round followed'} ({which})")
    return f"Sums verified by: {'; '.join(parts)}."


def _traffic(
    moved: list[tuple[int, str, str, int]], numbers: list[int]
) -> dict[str, dict[str, list[float]]]:
    """Bytes outside of rounds count with the next one; those of the last frames with the last."""
    found: dict[str, dict[str, list[float]]] = {"up": {}, "down": {}}
    for number, way, kind, size in moved:
        column = min(bisect.bisect_left(numbers, number), len(numbers) - 1)
        found[way].setdefault(kind, [0.0] * len(numbers))[column] += size
    return found


def _seconds(rows: Rows) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(rows))
    for i, row in enumerate(rows):
        for stage, seconds in row["seconds"].items():
            found[stage][i] = seconds
    return dict(found)


def _dropouts(
    rows: Rows, rounds: int, events: list[tuple[float, str, str]]
) -> list[tuple[str, str, str]]:
    """Who was missed, and why as far as the server knows; what else went wrong, when."""
    found, used, began = [], set[str](), 0.0
    for row in rows:
        label = _label(row, rounds)
        if row["reason"]:
            found.append((label, "", row["reason"]))
        for name, fault in row["faults"].items():
            used.add(f"round {row['round']}: {name}: {fault}")
            if name not in row["dropped"]:
                found.append((label, name, fault))
        for name, stage in row["dropped"].items():
            causes = [row["faults"][name]] if name in row["faults"] else []
            for at, kind, text in events:
                who, comma, why = text.partition(", ") if kind == "lost" else text.partition(": ")
                if kind in ("lost", "left") and who == name and began < at <= row["at"] and comma:
                    causes.append(f"{kind}: {why}")
                    used.add(text)
            cause = "; ".join(dict.fromkeys(causes)) or "no word of it"
            found.append((label, name, f"dropped while {stage} ({cause})"))
        began = row["at"]
    for at, kind, text in events:
        if kind in TROUBLE and text not in used:
            found.append((_when(at), "", f"{kind}: {text}"))
    return found


def _spent(plans: list[RoundPlan], clients: Sequence[Path]) -> list[str]:
    found = []
    noised = [plan for plan in plans if plan.noise.used]
    if noised:
        rho = sum(client_noise.concentrated(plan.noise, plan.layout) for plan in noised)
        for delta in (1e-3, 1e-5):
            value = client_noise.epsilon(rho, delta)
            found.append(
                f"Client noise in {len(noised)} planned sums: epsilon {value:.3g} at delta "
                f"{delta:g}, for one client more or less."
            )
    for folder in clients:
        from secure_fedprompt.clients.accounting import epsilon
        from secure_fedprompt.clients.ledger import NAME, Ledger

        if not (folder / NAME).exists():
            raise ConfigError(f"--client {folder} holds no {NAME}: that client has not trained")
        ledger = Ledger.read(folder / NAME)
        history, steps = ledger.history, sum(e.steps for e in ledger.entries)
        delta, accountant = ledger.counting
        found.append(
            f"{folder.name or folder}, over all runs of this state folder, at delta {delta:g}: "
            f"{steps} steps of training, epsilon {epsilon(history, delta, accountant):.4g} "
            f"({accountant}) for one image more or less; {len(ledger.uploads)} uploads, epsilon "
            f"{client_noise.epsilon(ledger.rho(), delta):.4g} (zCDP) for the client or zeros in "
            "its place."
        )
    return found or [
        "No client noise. What clients spend by DP-SGD is in their own ledgers: --client adds them."
    ]
