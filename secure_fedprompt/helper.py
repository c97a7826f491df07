"""The helper program: ``python -m secure_fedprompt.helper --config helper.toml``.

It evaluates secure selections for runs whose server names it. It holds no data and no model, and
what it sees means nothing without the server's half: run it on a machine, and under a
responsibility, that the server's operator does not control.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec
from rich.console import Console
from rich.markup import escape

from secure_fedprompt.clients.helper import Helper
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.state import Party
from secure_fedprompt.identity import whoami
from secure_fedprompt.protocol import command
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    ProtocolError,
    ReplayError,
    RunFailedError,
)
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import Seconds

EXAMPLES = """\
  secure-fedprompt keygen --name notary --role helper
  python -m secure_fedprompt.helper --key notary.pem --roster roster.toml \\
      --server tcp://192.0.2.10:5570
  # the server's file then says: selection = "secure", helper = "notary" """
ALIVE_SECONDS = 2.0


class HelperSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The helper's file.

    Attributes:
        key, roster: own key file and the federation's public roster file.
        server: address of the server.
        min_cohort: smallest cohort to help.
        patience: seconds without a connection before giving up.
    """

    key: str = "helper.pem"
    roster: str = "roster.toml"
    server: str = "tcp://127.0.0.1:5570"
    min_cohort: int = 3
    patience: Seconds = 60.0


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "python -m secure_fedprompt.helper",
        "Evaluate secure selections together with the server, on shares that mean nothing alone.",
        EXAMPLES,
    )
    command.add_flags(parser, HelperSettings)
    args = parser.parse_args(argv)
    body = lambda: help_out(command.load(HelperSettings, args), args.json)  # noqa: E731
    return command.guard(body, args.debug)


def help_out(settings: HelperSettings, json_path: str | None) -> int:
    """Stay to the end of the server's run.

    Raises:
        SecureFedPromptError: refused, disconnected, or the run failed.
    """
    console = Console(highlight=False)
    identity, roster, me, server = whoami(settings.key, settings.roster, "helper")
    policy = Policy(min_cohort=settings.min_cohort)
    party = Party(me.name, identity, roster, policy, MemoryJournal(), os.urandom)
    link = CurveLink(settings.server, server.curve, identity, settings.patience)
    try:
        link.connect()
        console.print(f"[bold]{me.name}[/] connected to {settings.server}, helps with selections")
        run, helped = loop(link, party, console)
        console.print(f"[green]run {run.hex()[:8]} is finished[/]; {helped} selections")
        command.write_json(json_path, {"name": me.name, "run": run.hex(), "selections": helped})
    finally:
        link.close()
    return 0


def hello(party: Party, nonce: bytes) -> m.Hello:
    return m.Hello(nonce, "", bytes(32), bytes(32), 0, party.roster.digest)


def loop(link: CurveLink, party: Party, console: Console) -> tuple[bytes, int]:
    """Answer frames until the run ends. Returns its id and the selections done.

    Raises:
        SecureFedPromptError
    """
    helper, nonce, run = Helper(party), party.entropy(32), b""
    connections, alive_at, helped = 0, 0.0, 0
    while True:
        if link.connections != connections:
            connections = link.connections
            link.send(hello(party, nonce))
        if (now := time.monotonic()) - alive_at > ALIVE_SECONDS:
            link.send(m.Alive())
            alive_at = now
        message = link.receive(0.2)
        match message:
            case None:
                pass
            case m.Rejoin():
                link.send(hello(party, nonce))
            case m.Refused():
                raise RunFailedError(f"server refuses us: {message.reason}")
            case m.Welcome():
                run = welcomed(message, run)
                link.send(party.ready(run))
            case m.RoundEnd():
                helper.end(message.run, message.round)
            case m.Finish() if message.run == run:
                link.send(m.Leave("Finished", ""))
                if message.reason:
                    raise RunFailedError(f"server ended the run: {message.reason}")
                return run, helped
            case _ if isinstance(message, m.TO_HELPER):
                try:
                    replies = helper.on(message)
                except ProtocolError as error:
                    console.print(f"[yellow]selection given up[/]: {escape(str(error))}")
                    kind = type(error).__name__
                    replies = [m.Withdraw(message.run, message.round, kind, m.line(error))]
                for reply in replies:
                    link.send(reply)
                    if isinstance(reply, m.HelperOutcome):
                        helped += 1
                        console.print(f"round {message.round}: selection evaluated")


def welcomed(message: m.Welcome, run: bytes) -> bytes:
    """The run's id, checked.

    Raises:
        ReplayError: it is not made of its nonces, or another run's.
    """
    if message.run != m.run_id(message.server_nonce, message.nonces):
        raise ReplayError("run id is not the digest of the run's nonces")
    if run not in (b"", message.run):
        raise ReplayError("welcome to another run: start this helper again to join it")
    return message.run


if __name__ == "__main__":
    sys.exit(main())
