"""Who may take part in a run: the checks of a client's greeting."""

from __future__ import annotations

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    MismatchError,
    NotOnRosterError,
    RosterMismatchError,
    RunFailedError,
    SecureFedPromptError,
)
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.settings import ServerSettings, quorum_of


def admit(
    state: RunState, settings: ServerSettings, roster: Roster, sender: str, hello: m.Hello
) -> None:
    """Check a greeting against the run; the first one fixes model and classes in ``state``.

    Raises:
        NotOnRosterError, RosterMismatchError, MismatchError: with both values.
    """
    check(state, settings, roster, sender, hello)
    if not state.model_fingerprint and roster.by_name[sender].role == "client":
        state.announced_by = sender
        state.model_fingerprint = hello.model_fingerprint
        state.classes_digest = hello.classes_digest


def check(
    state: RunState, settings: ServerSettings, roster: Roster, sender: str, hello: m.Hello | m.Probe
) -> None:
    """The same without fixing anything.

    Raises:
        NotOnRosterError, RosterMismatchError, MismatchError
    """
    role = roster.by_name[sender].role if sender in roster.by_name else ""
    if role not in ("client", "helper"):
        raise NotOnRosterError(f"{sender!r} is on the roster, but not as a client or helper")
    if sender in state.excluded:
        raise RunFailedError(
            f"{sender} is excluded from this run: it dealt a box that does not open, or complained "
            "falsely; the server's log says which"
        )
    if hello.roster_digest != roster.digest:
        raise RosterMismatchError(
            f"roster of {sender} is {hello.roster_digest.hex()[:16]}, the server's is "
            f"{roster.digest.hex()[:16]}: copy the same roster file to every machine"
        )
    if role == "helper":  # it holds neither model nor data
        return
    if hello.method and hello.method != settings.method:
        raise MismatchError(
            f"method of {sender} is {hello.method!r}, the run's is {settings.method!r}"
        )
    announced = {
        "model_fingerprint": (hello.model_fingerprint.hex(), settings.model_fingerprint),
        "classes_digest": (hello.classes_digest.hex(), settings.classes_digest),
    }
    for what, (theirs, pinned) in announced.items():
        if not theirs.startswith(pinned):
            raise MismatchError(f"{what} of {sender} is {theirs[:16]}, the server wants {pinned}")
    if not state.model_fingerprint:
        return
    first = f", as {state.announced_by} was first to say," if state.announced_by else ""
    if hello.model_fingerprint != state.model_fingerprint:
        raise MismatchError(
            f"model of {sender} has fingerprint {hello.model_fingerprint.hex()[:16]}, the "
            f"run's{first} is {state.model_fingerprint.hex()[:16]}: use the same weights everywhere"
        )
    if hello.classes_digest != state.classes_digest:
        raise MismatchError(
            f"class list of {sender} has digest {hello.classes_digest.hex()[:16]}, the "
            f"run's{first} has {state.classes_digest.hex()[:16]}: name the same classes in the "
            "same order; classes_digest in the server's file says which list is right"
        )


def probed(
    state: RunState, settings: ServerSettings, roster: Roster, sender: str, probe: m.Probe
) -> m.Probed:
    """Whether a client could join: nothing changes by it."""
    error, reason = "", ""
    try:
        check(state, settings, roster, sender, probe)
    except SecureFedPromptError as refusal:
        error, reason = type(refusal).__name__, m.line(refusal)
    clients = len(roster.with_role("client"))
    pinned = settings.model_fingerprint and settings.classes_digest
    compared = bool(state.model_fingerprint or pinned)
    return m.Probed(
        error, reason, settings.method_settings().to_bytes(), settings.protection,
        clients, quorum_of(settings, clients), int(compared),
    )  # fmt: skip
