"""``secure-fedprompt watch http://HOST:PORT``: a server on another machine, through its metrics.

What it shows are the sums that the server's ``metrics_bind`` gives to anybody who asks: no names,
no accuracy. For those, watch the run folder on the server itself.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from secure_fedprompt import show
from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import ConfigError, UnreachableError

TIMEOUT = 10.0
PATIENCE = 3  # unanswered questions in a row, before the server counts as gone
Values = dict[str, Any]  # numbers, and dictionaries of them


def ask(address: str) -> Values:
    """The metrics by name, with those that have a label as a dictionary by it.

    Args:
        address: "http://HOST:PORT".

    Raises:
        ConfigError: prometheus_client is missing, or what answers is no server of ours.
        UnreachableError: nothing answers.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise ConfigError(
            f"watch {address} needs: pip install 'secure-fedprompt[metrics]'"
        ) from None
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/metrics", timeout=TIMEOUT) as answer:  # noqa: S310
            text = answer.read(1 << 20).decode()
        found: Values = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix("fedprompt_").removesuffix("_total")
                if not sample.name.startswith("fedprompt_") or name.endswith("_created"):
                    continue
                if sample.labels:
                    (label,) = sample.labels.values()
                    found.setdefault(name, {})[label] = sample.value
                else:
                    found[name] = sample.value
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise UnreachableError(
            f"{address} does not answer ({reason}): is the server running, with metrics_bind set "
            "to an address that this machine reaches?"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{address} answers something else than metrics: {error}") from None
    if "learning_rounds_wanted" not in found:
        raise ConfigError(f"{address} is no server of secure-fedprompt: it has none of its metrics")
    return found


def render(now: Values) -> Table:
    """What is known, in lines."""
    table = Table(show_header=False, box=None)
    rounds, sent, seconds, happened = (
        now.get(name, {}) for name in ("rounds", "bytes", "stage_seconds", "events")
    )
    table.add_row(
        "learning rounds", f"{now['learning_round']:g} of {now['learning_rounds_wanted']:g}"
    )
    table.add_row("sums", f"{rounds.get('done', 0):g} done, {rounds.get('aborted', 0):g} aborted")
    table.add_row(
        "clients", f"{now['clients_in_sum']:g} in the last sum, {now['clients_dropped']:g} times "
        "one was dropped",
    )  # fmt: skip
    table.add_row(
        "bytes", f"{show.size(sent.get('up', 0))} up, {show.size(sent.get('down', 0))} down"
    )
    took = sorted(seconds.items(), key=lambda stage: -stage[1])
    table.add_row("seconds", ", ".join(f"{name} {s:.1f}" for name, s in took if s >= 0.05) or "-")
    events = {kind: n for kind, n in happened.items() if n and kind != "other"}
    table.add_row("events", ", ".join(f"{kind} {n:g}" for kind, n in events.items()) or "-")
    return table


def follow(
    address: str, once: bool, every: float, wait: Callable[[float], None] = time.sleep
) -> Values:
    """Show the metrics until the run is over; returns the last ones.

    Raises:
        ConfigError, UnreachableError: the server went away before its last learning round.
    """
    console, now, missing = Console(highlight=False), ask(address), 0
    if once:
        console.print(render(now))
        return now
    with Live(render(now), console=console, auto_refresh=False) as live:
        while missing < PATIENCE:
            wait(every)
            try:
                now, missing = ask(address), 0
            except UnreachableError:
                missing += 1
                continue
            live.update(render(now), refresh=True)
    done, wanted = now["learning_round"], now["learning_rounds_wanted"]
    if done != wanted:
        raise UnreachableError(
            f"{address} went away after learning round {done:g} of {wanted:g}: what became of it "
            "is in its run folder and log"
        )
    console.print("all learning rounds are done, and the server has ended")
    return now


def main(address: str, once: bool, every: float, json_path: str | None) -> int:
    """The command."""
    now = follow(address, once, every)
    command.write_json(json_path, "metrics", {
        "rounds_done": now["learning_round"], "learning_rounds": now["learning_rounds_wanted"],
        "outcomes": now["rounds"], "clients": now["clients_in_sum"],
        "losses": now["clients_dropped"], "bytes": now.get("bytes", {}),
        "seconds": now.get("stage_seconds", {}), "events": now["events"],
    })  # fmt: skip
    return 0
