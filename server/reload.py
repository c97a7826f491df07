"""A roster that changes while a run goes on."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable

import msgspec

from secure_fedprompt.host import files
from secure_fedprompt.host.log import Log
from secure_fedprompt.protocol.errors import ConfigError, SecureFedPromptError
from secure_fedprompt.server.planning import grown_terms
from secure_fedprompt.server.results import check_vouchers
from secure_fedprompt.server.run import Run
from secure_fedprompt.server.settings import ServerSettings, check_roster


class Reload:
    """SIGHUP: the roster file has changed, and with it perhaps how many clients a round takes.

    Attributes:
        settings: to go on with.
    """

    def __init__(
        self, settings: ServerSettings, read: Callable[[], ServerSettings], log: Log
    ) -> None:
        self.settings, self.log, self._read, self._asked = settings, log, read, False
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def look(self, run: Run) -> None:
        """Have a run pause, if a changed roster was announced that it can go on with."""
        if not self._asked:
            return
        self._asked = False
        try:
            new, roster = self._read(), files.read_roster(self.settings.roster)
            if roster.digest == run.roster.digest:
                self.log.info("roster", f"{self.settings.roster} is as it was")
                return
            settings = msgspec.structs.replace(
                self.settings, clients=new.clients, min_clients=new.min_clients
            )
            if roster.with_role("server") != run.roster.with_role("server"):
                raise ConfigError("the new roster names another server: stop this one first")
            check_roster(settings, roster)
            if run.state.terms is not None:  # between rounds there is no attempt
                between = dataclasses.replace(run.state, attempt=0)
                grown = grown_terms(settings, roster, between)
                names = [client.name for client in roster.with_role("client")]
                check_vouchers(run.state, grown, names)
        except SecureFedPromptError as error:
            self.log.error("roster", f"the run goes on as it was: {error}")
            return
        self.settings, run.pausing = settings, True
        self.log.info(
            "roster", f"{len(roster.clients)} clients are on the new roster: this run takes it "
            "before its next learning round; every client needs the same file",
        )  # fmt: skip
