"""A whole round in memory: the same state machines as on the network, and the tests' oracle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from secure_fedprompt.clients.party import Party, Replies
from secure_fedprompt.clients.rounds.base import Ready, State
from secure_fedprompt.clients.rounds.encrypted import Opening
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.layout import Values
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.rounds.base import Deadlines, Round, Stage
from secure_fedprompt.server.rounds.start import make_round

NEXT_PROMPT = b"the next prompt: a whole run computes it"
Tap = Callable[[str, str, m.Message], m.Message | None]


@dataclass
class Outcome:
    """What a simulated round did.

    Attributes:
        round: the server's side, with result, faults and dropouts.
        frames: every delivered frame as (sender, recipient, bytes).
        errors: what clients refused, by name.
        opened: what clients decrypted, under ``bfv`` and ``ckks``.
    """

    round: Round
    frames: list[tuple[str, str, bytes]] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    opened: dict[str, Opening] = field(default_factory=dict)


def run_round(
    plan: RoundPlan,
    parties: Mapping[str, Party],
    updates: Mapping[str, tuple[Values, float]],
    dropouts: Mapping[str, Stage] | None = None,
    tap: Tap = lambda sender, recipient, message: message,
) -> Outcome:
    """Run one round to its end.

    Args:
        plan: of the round; its cohort are the keys of ``parties``.
        parties: the clients, with their entropy and journals.
        updates: per client the values and the weight it uploads.
        dropouts: clients that vanish, with the stage in which their message never arrives.
        tap: sees each frame before delivery; returns it, a replacement, or None to lose it.

    Returns:
        the server's round, all frames and the clients' errors.
    """
    dropouts = dict(dropouts or {})
    any_party = next(iter(parties.values()))
    run_keys = {name: party.ready(plan.run) for name, party in parties.items()}
    server = make_round(plan, b"", any_party.roster, Deadlines(stage=1, training=1), run_keys)
    outcome, states = Outcome(server), dict[str, State]()
    clock = 0.0
    queue: deque[tuple[str, str, m.Message]] = deque(("", *out) for out in server.start(clock))
    while not server.over or queue:
        if not queue:  # everybody left has spoken: the deadline passes
            clock = server.deadline
            queue.extend(("", *out) for out in server.tick(clock))
            continue
        sender, recipient, original = queue.popleft()
        if sender and dropouts.get(sender) == server.stage:
            continue
        message = tap(sender, recipient, original)
        if message is None:
            continue
        frame = CATALOGUE.encode(message)
        outcome.frames.append((sender, recipient, frame))
        message = CATALOGUE.decode(frame)
        if not recipient:
            queue.extend(("", *out) for out in server.on(sender, message, clock))
            continue
        try:
            replies = _deliver(outcome, states, parties[recipient], message, updates)
        except SecureFedPromptError as error:
            outcome.errors.setdefault(recipient, error)
            queue.extend(("", *out) for out in server.lost(recipient, clock))
            continue
        queue.extend((recipient, "", reply) for reply in replies)
    return outcome


def _deliver(
    outcome: Outcome,
    states: dict[str, State],
    party: Party,
    message: m.Message,
    updates: Mapping[str, tuple[Values, float]],
) -> Replies:
    name = party.name
    if isinstance(message, m.Plan):
        states[name], replies = start(party, message.plan)
    elif isinstance(message, m.RoundEnd):
        return []
    else:
        states[name], replies = states[name].on(message)
    if isinstance(state := states[name], Ready):
        states[name], uploads = state.upload(*updates[name])
        replies = replies + uploads
    if isinstance(state, Opening):
        outcome.opened[name] = state
        states[name], replies = state.report(NEXT_PROMPT if state.plan.training else b"")
    return replies
