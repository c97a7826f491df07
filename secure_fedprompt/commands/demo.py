"""A federation on this machine: real keys, real sockets, one process each.

Writes ordinary key, roster and TOML files, starts exactly the commands that it prints, and shows
the server's output. Nothing is shared between the processes but the public roster.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from secure_fedprompt import show
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.commands.demo_files import (
    DATA,
    HELPER,
    NAMES,
    defaults,
    shown_as,
    write_files,
    write_samples,
)
from secure_fedprompt.host import command, plugins
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError
from secure_fedprompt.protocol.protections import PROTECTIONS
from secure_fedprompt.protocol.settings import AuditMode, SelectionMode, SelectionScope
from secure_fedprompt.server.settings import ServerSettings, check_settings

SECONDS = {  # on two cores, with four clients: the start, a learning round, one with dp
    "promptfl": (14, 1, 5), "fedotp": (17, 3, 10), "fedmgp": (19, 6.5, 19),
}  # fmt: skip
DP_SECONDS = 8  # for the table at the end
GRACE_SECONDS = 10.0
STAMP = re.compile(r"^\S+T\S+ (info|warning|error) +")  # of a line of the log


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt demo",
        "Train a shared prompt with a server and clients as processes on this machine, on "
        "generated pictures and a small CLIP that ship with the package. No network, no GPU.",
        "  secure-fedprompt demo\n"
        "  secure-fedprompt demo --clients 6 --rounds 3 --run-dir my-demo --json result.json\n"
        "  secure-fedprompt demo --protection bfv     # homomorphic encryption instead of masks\n"
        "  secure-fedprompt demo --protection none    # the same without protection\n"
        "  secure-fedprompt demo --target-epsilon 8   # differentially private training\n"
        "  secure-fedprompt demo --method fedmgp --selection secure --selection-scope federation",
    )
    parser.add_argument("--method", default="promptfl", metavar="NAME",
                        help="promptfl, fedotp, fedmgp or any other")  # fmt: skip
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="processes")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="learning rounds")
    parser.add_argument("--protection", choices=PROTECTIONS, default="masks",
                        help="of what clients send")  # fmt: skip
    parser.add_argument("--selection", choices=get_args(SelectionMode), default="client",
                        help="of FedMGP groups: by a client, or server and helper")  # fmt: skip
    parser.add_argument("--selection-scope", choices=get_args(SelectionScope), default="client",
                        help="of the secure one: by client, or the best of all")  # fmt: skip
    parser.add_argument(
        "--helper", choices=("client", "process"), default="client",
        help="of --selection secure: an elected client, or a process of its own",
    )  # fmt: skip
    parser.add_argument(
        "--target-epsilon", type=float, default=0.0, metavar="E",
        help="train with DP-SGD within this budget at every client (0: without)",
    )  # fmt: skip
    parser.add_argument("--delta", type=float, default=1e-3, metavar="D", help="of that budget")
    parser.add_argument(
        "--audit", choices=get_args(AuditMode), default="headers",
        help="of all logs; with 'full' the client alice writes her private record as well",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of data and batch order")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: a new folder")
    args = parser.parse_args(argv)
    return command.guard(
        lambda: run(
            args.method,
            args.clients,
            args.rounds,
            args.protection,
            args.seed,
            args.run_dir,
            args.json,
            {
                "selection": args.selection,
                "selection_scope": args.selection_scope,
                "helper": HELPER if args.helper == "process" else "",
            },
            {"kind": "sample", "target_epsilon": args.target_epsilon, "delta": args.delta}
            if args.target_epsilon
            else {},
            args.audit,
        ),
        args,
    )


def run(
    method: str,
    clients: int,
    rounds: int,
    protection: str,
    seed: int,
    folder: Path | None,
    json_path: str | None,
    selection: dict[str, Any],
    dp: dict[str, Any],
    audit: str = "headers",
) -> int:
    """Set up, start, watch, report.

    Raises:
        ConfigError: fewer than three clients, or the folder is in use.
        RunFailedError: a process failed; carries its own line.
    """
    check(clients, rounds)
    plugins.find(method)
    planned = {**defaults(method, bool(dp)), "method": method, **selection}
    check_settings(ServerSettings(**planned))
    PrivacySettings(**dp).check()
    console, begin = Console(highlight=False), time.monotonic()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="demo-", dir=Path.cwd()))
    check_folder(folder)
    commands = write_files(
        folder, method, clients, rounds, protection, seed,
        for_server={**selection, "audit": audit}, for_clients={"audit": audit}, dp=dp,
    )  # fmt: skip
    published = shown_as(method)["published"]
    ours = ", ".join(f"{k} {v!r}" for k, v in defaults(method, bool(dp)).items())
    start, each, private = SECONDS.get(method, SECONDS["promptfl"])
    guess = start + rounds * clients / 4 * (private if dp else each) + (DP_SECONDS if dp else 0)
    console.print(f"this takes about {guess:.0f} s on two cores, all in {folder}", soft_wrap=True)
    console.print(f"[bold]{method}[/] with {ours}, {rounds} rounds; published: {published}")
    console.print("data: posters and sketches, 32 classes, labels spread by Dirichlet(0.3)")
    console.print(
        "every client weighs the same; so that you can watch it learn, accuracy is counted in "
        "every round (metrics = 'rounds'): by default it is counted once, at the end",
        soft_wrap=True,
    )
    console.print("starting, each as a process of its own:")
    for words in commands:
        console.print("  python " + " ".join(words[1:]), soft_wrap=True)
    with processes(commands, folder, clients) as started:
        watch(console, started, folder)
    import json

    summary = json.loads((folder / "server" / "result.json").read_text())
    found = json.loads((folder / NAMES[0] / "result.json").read_text())
    show.add_history(summary, found["opened"])
    summary |= {"seconds": time.monotonic() - begin, "run_dir": str(folder), "clients": clients}
    show.show_run(console, summary)
    prompt = next((folder / NAMES[0] / "state").glob("prompt-*.safetensors"))
    if dp:
        summary |= _privately(console, folder, prompt, clients, seed)
    write_samples(folder / "samples", seed)
    console.print(
        f"{summary['seconds']:.0f} s; use the prompt: secure-fedprompt predict {prompt} "
        f"{folder / 'samples'}/*.png",
        soft_wrap=True,
    )
    summary.pop("format")
    command.write_json(json_path, "demo", summary)
    return 0


def check(clients: int, rounds: int) -> None:
    """Refuse a federation that protects nobody, or does nothing.

    Raises:
        ConfigError: naming the number.
    """
    if clients < 3:
        raise ConfigError(
            f"clients = {clients}: at least 3, or a peer's update is a subtraction away"
        )
    if rounds < 1:
        raise ConfigError(f"rounds = {rounds}: at least 1")


def check_folder(folder: Path) -> None:
    """Refuse a folder in which something is.

    Raises:
        ConfigError: naming it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"run-dir {folder} is not empty: choose another, or remove it")


@contextlib.contextmanager
def processes(
    commands: list[list[str]], folder: Path, clients: int, *, piped: bool = True
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the commands; whatever happens, none of them outlives the block.

    Args:
        piped: whether what the server says is read from its process, in the place of its file.
    """
    threads = str(max(1, (os.cpu_count() or 1) // clients))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    started: list[subprocess.Popen[str]] = []
    try:
        with contextlib.ExitStack() as files:
            for words in commands:
                own = Path(words[4]).parent
                log = files.enter_context(open(own / "output.log", "w"))
                out = subprocess.PIPE if piped and not started else log
                started.append(
                    subprocess.Popen(
                        words, stdout=out, stderr=subprocess.STDOUT, text=True, env=env,
                        start_new_session=True,
                    )
                )  # fmt: skip
            yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in started:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def watch(console: Console, started: list[subprocess.Popen[str]], folder: Path) -> None:
    """Show the server's lines until it ends; see ``check_ends``.

    Raises:
        RunFailedError: with the failing process's own last line.
    """
    server = started[0]
    assert server.stdout is not None
    with (folder / "server" / "output.log").open("w") as kept:
        for line in server.stdout:
            kept.write(line)
            words = STAMP.sub("", line.rstrip())
            console.print(f"  server | {words}", markup=False, soft_wrap=True)
    check_ends(started, folder)


def check_ends(started: list[subprocess.Popen[str]], folder: Path) -> None:
    """Everybody must have ended well; clients have a moment for it after the server.

    Raises:
        RunFailedError: with the failing processes' own last lines.
    """
    if started[0].wait():
        said = (folder / "server" / "output.log").read_text().strip().splitlines()
        reasons = [f"server: {STAMP.sub('', said[-1]) if said else 'it said nothing'}"]
        for log in sorted(folder.glob("*/output.log")):
            lines = log.read_text().strip().splitlines()
            if lines and "Error" in lines[-1]:
                reasons.append(f"{log.parent.name}: {lines[-1]}")
        raise RunFailedError("; ".join(reasons))
    for process in started[1:]:
        try:
            code = process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            name = Path(str(process.args[4])).parent.name  # type: ignore[index]
            raise RunFailedError(f"{name} did not end well: see {folder / name / 'output.log'}")


if __name__ == "__main__":
    sys.exit(main())


def _privately(
    console: Console, folder: Path, prompt: Path, clients: int, seed: int
) -> dict[str, Any]:
    """What clients with dp do not count: the accuracy, here where all pictures are ours; and what
    they spent."""
    from secure_fedprompt.clients.accounting import epsilon
    from secure_fedprompt.clients.ledger import NAME, Ledger
    from secure_fedprompt.clients.settings import ModelSettings
    from secure_fedprompt.commands.evaluate import score
    from secure_fedprompt.prompt_file import read_prompt

    data = ModelSettings(**{**DATA, "partition": "iid", "data_seed": seed})
    accuracy = score(data, read_prompt(prompt)).figures["accuracy"]
    console.print(f"accuracy of {prompt.parent.parent.name}'s prompt on all test pictures "
                  f"{accuracy:.1%}; clients with dp count none")  # fmt: skip
    spent = {}
    for state in sorted(folder.glob(f"*/state/{NAME}")):
        ledger = Ledger.read(state)
        delta, accountant = ledger.counting
        spent[state.parents[1].name] = epsilon(ledger.history, delta, accountant)
    told = ", ".join(f"{name} {value:.4g}" for name, value in spent.items())
    console.print(f"epsilon ({accountant}) at delta {delta:g}: {told}", soft_wrap=True)
    return {
        "accuracy": accuracy,
        "epsilon_by_client": spent,
        "delta": delta,
        "accountant": accountant,
    }
