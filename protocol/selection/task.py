"""What is selected in a round, as it stands in the plan, and how it is laid out for the circuits.

    client       the s largest of each client's m keys, in order: the published rule
    federation   the K largest of all clients' keys: an owner of c of them fills its first c slots;
                 a slot that too few owners would fill is closed to all

Text and visual groups are selected apart. Both parties and the owners compute layouts from the plan
and the list of owners alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.codec import U8, U16, U32, Name, PublicKey, Signature
from secure_fedprompt.protocol.errors import FieldError, GarblingError, PlanError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.selection import circuits
from secure_fedprompt.protocol.selection.builder import Circuit
from secure_fedprompt.protocol.selection.shares import Bits, Keys, order, to_bits

SCOPES = ("client", "federation")
MAX_GROUPS = 64
MAX_CANDIDATES = 1024  # keys in one circuit of scope federation: four seconds to build it
MAX_BYTES = 150_000_000  # of one frame of tables
Choice = tuple[NDArray[np.int64], ...]  # by modality: chosen groups, best first


@dataclass(frozen=True)
class Selection:
    """The secure selection of a round; ``NONE`` if clients choose for themselves.

    Attributes:
        scope: 0 for none, else 1 + index into ``SCOPES``.
        modalities: how many kinds of groups are selected apart.
        groups, slots: m and s.
        keep: K for the whole cohort, and fillers: the fewest owners of a slot, scope federation.
        helper: who evaluates; helper_key, helper_signature: of its ``Ready`` of this run.
    """

    scope: U8
    modalities: U8
    groups: U16
    slots: U16
    keep: U32
    fillers: U16
    helper: Name
    helper_key: PublicKey
    helper_signature: Signature

    @property
    def kind(self) -> str:
        """As settings and policies name it: "client", "secure" or "secure-federation"."""
        return ("client", "secure", "secure-federation")[self.scope]

    @property
    def federation(self) -> bool:
        return self.scope == 1 + SCOPES.index("federation")

    def check(self, clients: int) -> None:
        """Refuse what contradicts itself or is too large.

        Raises:
            PlanError: naming the field.
        """
        if self.scope == 0:
            if self != NONE:
                raise PlanError("fields of a secure selection without one")
            return
        if self.scope > len(SCOPES) or self.modalities not in (1, 2):
            raise PlanError(f"selection scope {self.scope} of {self.modalities} modalities")
        if not 1 <= self.slots <= self.groups <= MAX_GROUPS:
            raise PlanError(f"{self.slots} slots for {self.groups} groups, at most {MAX_GROUPS}")
        if not self.helper:
            raise PlanError("a secure selection without a helper")
        if self.federation:
            candidates = clients * self.groups
            if not 1 <= self.keep <= candidates:
                raise PlanError(f"{self.keep} groups to keep of {candidates}")
            if not 1 <= self.fillers <= clients:
                raise PlanError(f"{self.fillers} fillers of a slot from {clients} clients")
            if candidates > MAX_CANDIDATES:
                raise PlanError(
                    f"{candidates} groups in one selection, at most {MAX_CANDIDATES}: use "
                    "selection_scope = 'client', fewer clients or fewer groups"
                )
        elif clients * self.modalities * most_bytes(self.groups) > MAX_BYTES:
            raise PlanError(
                f"{self.groups} groups of {clients} clients are too many to compare: use fewer"
            )


def most_bytes(groups: int) -> int:
    """No ``top_s`` of so many keys is larger: additions and transfers, and a comparison a pair."""
    return 3_000 * groups + 1_100 * (groups * (groups - 1) // 2) + 200 * groups * groups


NONE = Selection(0, 0, 0, 0, 0, 0, "", bytes(32), bytes(64))


def session_of(plan_digest: bytes) -> bytes:
    """The id of the evaluation between server and helper: every attempt has its own."""
    return digest(Purpose.SELECTION, plan_digest)


@dataclass(frozen=True)
class Task:
    """A selection over the clients that sent their keys.

    Attributes:
        owners: sorted names.
    """

    selection: Selection
    owners: tuple[str, ...]

    @property
    def circuit(self) -> Circuit:
        s, n = self.selection, len(self.owners)
        if s.federation:
            return circuits.fill_slots(n, s.groups, self.keep, s.slots, s.fillers)
        return circuits.top_s(s.groups, s.slots)

    @property
    def keep(self) -> int:
        """K for these owners."""
        s = self.selection
        return min(s.keep, len(self.owners) * s.groups)

    @property
    def outcome_bits(self) -> int:
        """Of one owner."""
        s = self.selection
        return s.modalities * s.slots * (1 if s.federation else s.groups)

    @property
    def outcome_size(self) -> int:
        """Bytes of one owner's share of the outcome."""
        return -(-self.outcome_bits // 8)

    def inputs(self, words: Mapping[str, Keys]) -> Bits:
        """Circuit inputs from each owner's (modalities, groups) words."""
        s = self.selection
        stacked = np.stack([words[name] for name in self.owners])  # (n, modalities, m)
        if s.federation:
            stacked = stacked.transpose(1, 0, 2)
            return to_bits(stacked.reshape(s.modalities, -1))
        return to_bits(stacked.reshape(-1, s.groups))

    def outcomes(self, shares: Bits) -> dict[str, bytes]:
        """Each owner's part of (outputs, batch) output shares, packed."""
        s, n = self.selection, len(self.owners)
        if s.federation:
            rows = shares.reshape(n, s.slots, s.modalities).transpose(0, 2, 1).reshape(n, -1)
        else:
            table = shares.reshape(s.slots, s.groups, n, s.modalities)
            rows = table.transpose(2, 3, 0, 1).reshape(n, -1)
        packed = np.packbits(rows, axis=1, bitorder="little")
        return {name: row.tobytes() for name, row in zip(self.owners, packed, strict=True)}


def open_outcome(selection: Selection, ours: bytes, theirs: bytes, keys: Keys) -> Choice:
    """The owner's choice from both shares.

    Args:
        keys: the owner's own, (modalities, groups); they give the order in scope federation.

    Raises:
        FieldError: a share has the wrong size; GarblingError: they open to no possible outcome.
    """
    task = Task(selection, ("owner",))
    if not len(ours) == len(theirs) == task.outcome_size:
        raise FieldError(
            f"outcome shares of {len(ours)} and {len(theirs)} bytes, {task.outcome_size} expected"
        )
    both = np.frombuffer(ours, np.uint8) ^ np.frombuffer(theirs, np.uint8)
    bits = np.unpackbits(both, bitorder="little").astype(bool)
    if bits[task.outcome_bits :].any():
        raise GarblingError("outcome shares differ in their padding")
    choice = []
    table = bits[: task.outcome_bits].reshape(selection.modalities, selection.slots, -1)
    for own, chosen in zip(keys, table, strict=True):
        best = order(own)[: selection.slots]
        if selection.federation:
            filled = int(chosen.sum())
            if not chosen[:filled].all():
                raise GarblingError("the opened outcome skips a slot")
            choice.append(best[:filled])
        else:
            if (chosen.sum(1) != 1).any() or not np.array_equal(chosen.argmax(1), best):
                raise GarblingError("the opened outcome is not the order of this client's keys")
            choice.append(best)
    return tuple(choice)
