"""The command ``secure-fedprompt``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": ("secure_fedprompt.commands.demo", "server and clients as processes on this machine"),
    "init": ("secure_fedprompt.commands.sites", "begin a federation: server.toml, an invitation"),
    "join": ("secure_fedprompt.commands.sites", "answer an invitation: client.toml, an entry"),
    "admit": ("secure_fedprompt.commands.sites", "put sites on the roster"),
    "keygen": ("secure_fedprompt.commands.keys", "make a key file and its roster entry"),
    "roster": (
        "secure_fedprompt.commands.keys",
        "add to, list and check the roster of public keys",
    ),
    "check": ("secure_fedprompt.commands.check", "test a client's keys, data, model and server"),
    "server": (
        "secure_fedprompt.server.__main__",
        "aggregate (same as -m secure_fedprompt.server)",
    ),
    "client": ("secure_fedprompt.client", "take part (same as -m secure_fedprompt.client)"),
    "helper": ("secure_fedprompt.helper", "help a server select (same as -m ....helper)"),
    "explain": ("secure_fedprompt.commands.explain", "parameters, bytes and error of a protection"),
    "privacy": (
        "secure_fedprompt.commands.privacy",
        "epsilon of DP-SGD before a run, and spent so far",
    ),
    "audit": ("secure_fedprompt.audit.command", "check what crossed the wire of a run"),
    "audit-diff": ("secure_fedprompt.audit.command", "two audit logs side by side"),
    "report": ("secure_fedprompt.report.command", "a run as one HTML page"),
    "runs": ("secure_fedprompt.commands.runs", "list run folders"),
    "export": ("secure_fedprompt.commands.runs", "rounds of run folders as CSV or Parquet"),
    "watch": ("secure_fedprompt.commands.watch", "live view of a running server"),
    "simulate": ("secure_fedprompt.commands.simulate", "many clients in one process"),
    "bench": ("secure_fedprompt.commands.bench", "measure what the documentation claims"),
    "evaluate": (
        "secure_fedprompt.commands.evaluate",
        "accuracy of a trained prompt on a data set",
    ),
    "predict": ("secure_fedprompt.commands.evaluate", "class of images under a trained prompt"),
}


def usage() -> str:
    lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: secure-fedprompt COMMAND [options]\n\n"
        "Federated prompt tuning of CLIP in which nobody can read a single client's update.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "examples:\n"
        "  secure-fedprompt demo\n"
        "  secure-fedprompt keygen --name alice\n"
        "  secure-fedprompt COMMAND --help\n"
    )


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from secure_fedprompt import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"unknown command {words[0]!r}; see 'secure-fedprompt --help'", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[words[0]][0])
    entry = getattr(module, words[0].replace("-", "_"), None) or module.main
    result: int = entry(words[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
