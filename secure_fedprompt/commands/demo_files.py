"""The files of a demo federation: keys, roster, settings and example images of each party."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from secure_fedprompt.host.files import make_key
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.protections import facts_of
from secure_fedprompt.protocol.roster import Roster

NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
METHODS: dict[str, dict[str, Any]] = {
    "promptfl": {
        "defaults": {"n_ctx": 4, "init": "a photo of a", "lr": 0.02, "epochs": 4, "batch_size": 32},
        "published": "16 random context tokens, lr 0.001, 1 to 5 epochs, batch 32, 10 to 20 rounds",
    },
    "fedotp": {
        "defaults": {"n_ctx": 4, "init": "a photo of a", "lr": 0.02, "epochs": 4, "batch_size": 32},
        "published": "16 random context tokens, lr 0.001, 5 epochs, 10 rounds, eps 0.01 or 0.1",
    },
    "fedmgp": {
        "defaults": {"lr": 0.02, "epochs": 1, "batch_size": 8},
        "published": "5 groups, 2 slots, 2 tokens each, lr 0.001, 2 epochs, batch 8, 10 rounds",
    },
}
SAMPLES = 6
DATA: dict[str, Any] = {
    "dataset": "generated",
    "styles": "poster,sketch",
    "per_class": 16,
    "test_per_class": 12,
    "shots": 24,
    "partition": "dirichlet",
    "beta": 0.3,
}
HELPER = "notary"


def write_samples(folder: Path, seed: int) -> None:
    """Pictures to try the prompt on, none of them trained on; a name is what it shows."""
    from secure_fedprompt.clients.data.loading import load_sets
    from secure_fedprompt.clients.settings import DataSettings

    _, test = load_sets(DataSettings(**{**DATA, "data_seed": seed}))
    folder.mkdir(exist_ok=True)
    for i in np.random.default_rng(seed).choice(len(test), SAMPLES, replace=False):
        name = test.class_names[int(test.labels[i])].replace(" ", "-")
        test.image(i).save(folder / f"{name}-{i}.png")


def write_files(
    folder: Path,
    method: str,
    clients: int,
    rounds: int,
    protection: str,
    seed: int,
    *,
    for_server: dict[str, Any] | None = None,
    for_clients: dict[str, Any] | None = None,
    dp: dict[str, Any] | None = None,
) -> list[list[str]]:
    """Keys, roster and configs as an operator would write them; returns the commands to start.

    Args:
        folder: created; everything goes there.
        method, clients, rounds, protection, seed: as the flags.
        for_server, for_clients: further settings, on top of the demo's; paths among them are
            absolute. A helper of the name ``HELPER`` is a process of its own.
        dp: the clients' [dp] table.
    """
    names = [*NAMES, *(f"client{i:03d}" for i in range(len(NAMES), clients))][:clients]
    members = [make_key("server", "server", folder / "server")]
    members += [make_key(name, "client", folder / name) for name in names]
    helper = str((for_server or {}).get("helper", ""))
    if helper == HELPER:
        members.append(make_key(helper, "helper", folder / helper))
    (folder / "roster.toml").write_text(Roster.of(tuple(members)).to_toml())
    address = f"tcp://127.0.0.1:{free_port()}"
    settings = defaults(method, bool(dp))
    server = {
        "key": "server.pem", "roster": "../roster.toml", "bind": address,
        "run_dir": "run", "method": method, "rounds": rounds,
        "protection": protection, "clients": clients, "metrics": "rounds",
        "gather_seconds": 120.0, "patience": 60.0,
        **settings, **(for_server or {}),
    }  # fmt: skip
    write_toml(folder / "server" / "server.toml", server)
    python = sys.executable
    config = str(folder / "server" / "server.toml")
    result = str(folder / "server" / "result.json")
    commands = [[python, "-m", "secure_fedprompt.server", "--config", config, "--json", result]]
    threads = max(1, (os.cpu_count() or 1) // clients)
    for i, name in enumerate(names):
        client = {
            "key": f"{name}.pem", "roster": "../roster.toml", "server": address,
            "state_dir": "state", "threads": threads, "seed": seed,
            **DATA, "part": i, "parts": clients, "data_seed": seed,
            **(for_clients or {}),
        }  # fmt: skip
        client["private_record"] = i == 0 and client.get("audit") == "full"
        path = folder / name / "client.toml"
        allowed: dict[str, Any] = {"methods": [method]} if method not in METHODS else {}
        allowed |= {"protections": [protection]} if not facts_of(protection).default else {}
        allowed |= {"metrics": ["rounds"]} if server["metrics"] == "rounds" else {}
        if (weights := server.get("weights", "uniform")) != "uniform":
            allowed["weights"] = [weights]
        if server.get("selection") == "secure":
            federation = server["selection_scope"] == "federation"
            allowed["selections"] = ["secure-federation" if federation else "secure"]
            allowed |= {"client_helpers": True} if helper != HELPER else {}
        write_toml(path, client, {k: v for k, v in (("policy", allowed), ("dp", dp)) if v})
        words = [python, "-m", "secure_fedprompt.client", "--config", str(path)]
        commands.append([*words, "--json", str(folder / name / "result.json")])
    if helper == HELPER:
        path = folder / helper / "helper.toml"
        own = {"key": f"{helper}.pem", "roster": "../roster.toml", "server": address,
               "state_dir": "state"}  # fmt: skip
        write_toml(path, {**own, "audit": str((for_server or {}).get("audit", "headers"))})
        words = [python, "-m", "secure_fedprompt.helper", "--config", str(path)]
        commands.append([*words, "--json", str(folder / helper / "result.json")])
    return commands


def write_toml(
    path: Path, values: dict[str, Any], tables: dict[str, dict[str, Any]] | None = None
) -> None:
    """Plain TOML of strings, numbers, booleans and lists of strings: JSON writes these alike."""
    import json

    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for name, table in (tables or {}).items():
        lines += ["", f"[{name}]"] + [
            f"{key} = {json.dumps(value)}" for key, value in table.items()
        ]
    path.write_text("\n".join(lines) + "\n")


def defaults(method: str, private: bool) -> dict[str, Any]:
    """The demo's settings of a method; gradients of single images take several times as long."""
    found = dict(shown_as(method)["defaults"])
    return {**found, "epochs": max(1, found["epochs"] // 2)} if private else found


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown_as(method: str) -> dict[str, Any]:
    """How the demo runs a method: those without a row of their own as it runs PromptFL."""
    return METHODS.get(method, {**METHODS["promptfl"], "published": method_facts(method).source})
