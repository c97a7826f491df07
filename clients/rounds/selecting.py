"""A client in the selection of a round: it shares its keys and opens its own outcome.

Awaiting --share_keys--> Choosing --Outcome--> Chosen (which is Awaiting again, with a choice)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import Awaiting, State, Step, Takes
from secure_fedprompt.protocol import masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import PolicyError, UpdateError
from secure_fedprompt.protocol.expand import Purpose, derive
from secure_fedprompt.protocol.keys import agree, seal, unseal
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection import shares, task
from secure_fedprompt.protocol.selection.task import Choice


def check_helper(party: Party, plan: RoundPlan) -> None:
    """Refuse a helper that is not on the roster, did not sign its key for this run, or is a client
    whom the policy does not allow to be one.

    Raises:
        RosterError, SignatureError, PolicyError
    """
    chosen, policy = plan.selection, party.policy
    client = chosen.helper in party.roster.clients and chosen.helper != party.name
    if client and not policy.helpers and not policy.client_helpers:
        raise PolicyError(
            f"the server wants {chosen.helper!r}, a client, as helper: name it in policy.helpers, "
            "set policy.client_helpers = true, or let the server name a member of role helper"
        )
    ready = m.Ready(
        plan.run, chosen.helper, chosen.helper_key, bytes(32), bytes(32), chosen.helper_signature
    )
    party.check_run_key(plan, ready, chosen.helper)


def box_key(party: Party, plan: RoundPlan, peer: m.Ready | None, purpose: Purpose) -> bytes:
    """Key of a box between an owner and the helper, in this round and direction.

    Args:
        peer: the owner, if we are the helper; None for the helper, if we are the owner.
    """
    chosen = plan.selection
    owner = party.name if peer is None else peer.name
    public = chosen.helper_key if peer is None else peer.seal_key
    shared = agree(party.keyring.secret, public, chosen.helper if peer is None else peer.name)
    return derive(shared, purpose, plan.digest, owner.encode(), chosen.helper.encode())


def share_keys(ready: Awaiting, keys: shares.Keys) -> Step:
    """Send the shares of this client's selection keys, (modalities, groups).

    Raises:
        UpdateError: the keys are not those of the plan's groups.
    """
    party, plan = ready.party, ready.plan
    chosen = plan.selection
    if keys.shape != (chosen.modalities, chosen.groups):
        raise UpdateError(
            f"selection keys of shape {keys.shape}, the plan has {chosen.modalities} modalities "
            f"of {chosen.groups} groups"
        )
    ours, seed = shares.split(keys, plan.digest, party.entropy)
    key = box_key(party, plan, None, Purpose.SHARE_BOX)
    box = seal(key, seed, masking.seal_context(plan, party.name, chosen.helper))
    reply = m.KeyShares(plan.run, plan.round, ours.astype("<u4").tobytes(), box)
    return Choosing(party, plan, ready, keys), [reply]


@dataclass(frozen=True, repr=False)
class Choosing(State):
    """The shares are on their way; the outcome is awaited."""

    ready: Awaiting
    keys: shares.Keys

    def _on_outcome(self, message: m.Outcome) -> Step:
        plan, party = self.plan, self.party
        helper = plan.selection.helper
        key = box_key(party, plan, None, Purpose.OUTCOME_BOX)
        context = masking.seal_context(plan, helper, party.name)
        theirs = unseal(key, bytes(message.box), context, helper)
        choice = task.open_outcome(plan.selection, bytes(message.share), theirs, self.keys)
        return Chosen(party, plan, self.ready, choice), []

    takes: ClassVar[Takes] = {m.Outcome: _on_outcome}


@dataclass(frozen=True, repr=False)
class Chosen(Awaiting):
    """The outcome is known: what it chose can be uploaded."""

    ready: Awaiting
    opened: Choice

    @property
    def choice(self) -> Choice:
        return self.opened

    def _encode(self, vector: Vector) -> bytes:
        return self.ready._encode(vector)

    def _send(self, data: bytes) -> Step:
        return self.ready._send(data)
