"""The helper program: ``python -m secure_fedprompt.helper --config helper.toml``.

It evaluates secure selections for runs whose server names it. It holds no data and no model, and
what it sees means nothing without the server's half: run it on a machine, and under a
responsibility, that the server's operator does not control.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec

from secure_fedprompt.clients.helper import Helper
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.party import Party, Replies, refusal
from secure_fedprompt.host import command
from secure_fedprompt.host.files import whoami
from secure_fedprompt.host.log import Log
from secure_fedprompt.host.recorder import recorder
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    ReplayError,
    RunFailedError,
    SecureFedPromptError,
)
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import FilePath, LogPath, Positive, Seconds
from secure_fedprompt.protocol.terms import RunTerms

EXAMPLES = """\
  secure-fedprompt keygen --name notary --role helper
  python -m secure_fedprompt.helper --key notary.pem --roster roster.toml \\
      --server tcp://192.0.2.10:5570
  # the server's file then says: selection = "secure", helper = "notary" """
ALIVE_SECONDS = 2.0


class HelperSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The helper's file.

    Attributes:
        key: own key file.
        roster: the federation's public roster file, the same everywhere.
        server: address of the server.
        min_cohort: smallest cohort to help.
        patience: seconds without a connection before giving up.
        state_dir: of the audit log; {name} in it is the helper's.
        audit: log of frames, in state_dir/audit: "off", "headers" (sizes, digests), or "full".
            Its shares and the server's open scores together: keep the two logs apart.
        audit_mb: most megabytes of that log; its oldest parts go first.
        log: file to append what the terminal shows to (objects, if it ends in .jsonl); or "json",
            for objects in the place of text on the terminal.
        log_level: least that is told: "debug", "info", "warning" or "error".
    """

    key: FilePath = "helper.pem"
    roster: FilePath = "roster.toml"
    server: str = "tcp://127.0.0.1:5570"
    min_cohort: int = 3
    patience: Seconds = 14400.0
    state_dir: FilePath = "state/{name}"
    audit: str = "headers"
    audit_mb: Positive = 2048
    log: LogPath = ""
    log_level: str = "info"


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "python -m secure_fedprompt.helper",
        "Evaluate secure selections together with the server, on shares that mean nothing alone.",
        EXAMPLES,
    )
    command.add_flags(parser, HelperSettings)
    args = parser.parse_args(argv)
    body = lambda: help_out(command.load(HelperSettings, args), args.json)  # noqa: E731
    return command.guard(body, args)


def help_out(settings: HelperSettings, json_path: str | None) -> int:
    """Stay to the end of the server's run.

    Raises:
        SecureFedPromptError: refused, disconnected, or the run failed.
    """
    with Log("helper", settings.log, settings.log_level) as log:
        return _help_out(settings, json_path, log)


def _help_out(settings: HelperSettings, json_path: str | None, log: Log) -> int:
    identity, roster, me, server = whoami(settings.key, settings.roster, "helper")
    log.name = me.name
    policy = Policy(min_cohort=settings.min_cohort)
    party = Party(me.name, identity, roster, policy, MemoryJournal(), os.urandom)
    folder = Path(settings.state_dir.replace("{name}", me.name))
    frames = recorder(folder, settings.audit, settings.audit_mb, identity, me, roster)
    link = CurveLink(
        settings.server, server.curve, identity, settings.patience, frames,
        lambda text: log.warning("link", text),
    )  # fmt: skip
    try:
        link.connect()
        log.info("connected", f"{me.name} connected to {settings.server}, helps with selections")
        session = HelperSession(party)
        loop(link, session, log)
        run, helped = session.run.hex(), session.helped
        log.info("finished", f"run {run[:8]} is finished; {helped} selections", run=run)
        result = {"name": me.name, "run": run, "selections": helped}
        command.write_json(json_path, "helper", result)
    finally:
        link.close()
        if frames is not None:
            frames.close()
    return 0


class HelperSession:
    """A helper over a whole run, as a state machine without I/O.

    Attributes:
        run: its id, once welcomed; over: whether it has ended; helped: selections so far.
    """

    def __init__(self, party: Party) -> None:
        self.party, self.run, self.over, self.helped = party, b"", False, 0
        self._helper, self._nonce, self._opened = Helper(party), party.entropy(32), False
        self._commitments: tuple[m.Nonce, ...] = ()
        self._terms: RunTerms | None = None

    def hello(self) -> m.Hello:
        """The first frame of each connection."""
        if self._opened and self._terms is None:  # it is known: the next run needs another
            self._nonce, self._opened, self.run = self.party.entropy(32), False, b""
        committed = m.commitment(self.party.name, self._nonce)
        return m.Hello(committed, "", bytes(32), bytes(32), self.party.roster.digest)

    def on(self, message: m.Message) -> Replies:
        """Take one frame. One that breaks a rule only ends our part in its round.

        Raises:
            SecureFedPromptError: refused, or the run failed.
        """
        match message:
            case m.Rejoin():
                return [self.hello()]
            case m.LogHead():
                self.party.check_head(message)
            case m.Refused():
                raise refusal(message)
            case m.Welcome():
                self._welcome(message)
                return [self.party.ready(self.run, self._nonce)]
            case m.Terms() if message.run == self.run:
                self._terms = self.party.check_terms(message, self._commitments)
                return [m.Accept(self.run, self._terms.digest)]
            case m.RoundEnd():
                self._helper.end(message.run, message.round)
            case m.Finish() if not self.run:
                raise RunFailedError("the run ended before this helper could take part")
            case m.Finish() if message.run == self.run:
                self.over = True
                if message.reason:
                    raise RunFailedError(f"server ended the run: {message.reason}")
                return [m.Leave("Finished", "")]
            case m.HelperPlan() | m.HelperAnswer() | m.HelperInputs() | m.HelperTables():
                if message.run != self.run or self._terms is None:
                    return []
                try:
                    if isinstance(message, m.HelperPlan):
                        self._terms.admit(message.plan)
                    replies = self._helper.on(message)
                except SecureFedPromptError as error:
                    kind = type(error).__name__
                    return [m.Withdraw(message.run, message.round, kind, m.line(error))]
                self.helped += sum(isinstance(reply, m.HelperOutcome) for reply in replies)
                return replies
        return []

    def _welcome(self, message: m.Welcome) -> None:
        if message.run != m.run_id(message.server_nonce, message.commitments):
            raise ReplayError("run id is not the digest of the run's nonces")
        if self.run not in (b"", message.run):
            raise ReplayError("welcome to another run: start this helper again to join it")
        self.run, self._commitments, self._opened = message.run, message.commitments, True


def loop(link: CurveLink, session: HelperSession, log: Log) -> None:
    """Move frames between socket and session until the run ends.

    Raises:
        SecureFedPromptError
    """
    connections, alive_at = 0, 0.0
    while not session.over:
        if link.connections != connections:
            connections = link.connections
            link.send(session.hello())
        if (now := time.monotonic()) - alive_at > ALIVE_SECONDS:
            link.send(m.Alive())
            alive_at = now
        message = link.receive(0.2)
        for reply in session.on(message) if message else ():
            link.send(reply)
            if isinstance(reply, m.HelperOutcome):
                log.info(
                    "selection", f"round {reply.round}: selection evaluated", round=reply.round
                )
            if isinstance(reply, m.Withdraw):
                log.warning("selection", f"selection given up: {reply.reason}", round=reply.round)


if __name__ == "__main__":
    sys.exit(main())
