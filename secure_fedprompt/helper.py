"""The helper program: ``python -m secure_fedprompt.helper --config helper.toml``.

It evaluates secure selections for runs whose server names it. It holds no data and no model, and
what it sees means nothing without the server's half: run it on a machine, and under a
responsibility, that the server's operator does not control.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from secure_fedprompt.clients.conversation import Conversation
from secure_fedprompt.clients.helper import HelperSession
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.settings import HelperSettings
from secure_fedprompt.host import command
from secure_fedprompt.host.files import whoami
from secure_fedprompt.host.log import Log
from secure_fedprompt.host.recorded import RecordedLink
from secure_fedprompt.host.recorder import recorder
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.transport import Link

EXAMPLES = """\
  secure-fedprompt keygen --name notary --role helper
  python -m secure_fedprompt.helper --key notary.pem --roster roster.toml \\
      --server tcp://192.0.2.10:5570
  # the server's file then says: selection = "secure", helper = "notary" """


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
        settings.server, server.curve, identity, settings.patience,
        lambda text: log.warning("link", text),
    )  # fmt: skip
    try:
        link.connect()
        log.info("connected", f"{me.name} connected to {settings.server}, helps with selections")
        session = HelperSession(party)
        loop(RecordedLink(link, frames) if frames else link, session, log)
        run, helped = session.run.hex(), session.helped
        log.info("finished", f"run {run[:8]} is finished; {helped} selections", run=run)
        result = {"name": me.name, "run": run, "selections": helped}
        command.write_json(json_path, "helper", result)
    finally:
        link.close()
        if frames is not None:
            frames.close()
    return 0


def loop(link: Link, session: HelperSession, log: Log) -> None:
    """Move frames between link and session until the run ends.

    Raises:
        SecureFedPromptError
    """
    server = Conversation(link, session.hello)
    while not session.over:
        server.greet()
        server.live()
        message = server.receive(0.2)
        for reply in session.on(message) if message else ():
            server.send([reply])
            if isinstance(reply, m.HelperOutcome):
                log.info(
                    "selection", f"round {reply.round}: selection evaluated", round=reply.round
                )
            if isinstance(reply, m.Withdraw):
                log.warning("selection", f"selection given up: {reply.reason}", round=reply.round)


if __name__ == "__main__":
    sys.exit(main())
