"""The plan of one round: everything both sides must agree on, and its digest.

The digest is bound into every key, seal and signature of the round, so two parties with
different plans cannot complete a round together.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated

from secure_fedprompt.protocol import client_noise, homomorphic
from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.codec import (
    F64,
    MAX_FRAME,
    U8,
    U16,
    U32,
    Digest,
    Many,
    Roll,
    RunId,
    Text,
    encode_fields,
)
from secure_fedprompt.protocol.errors import PlanError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.fixedpoint import check_fits
from secure_fedprompt.protocol.homomorphic import Parameters
from secure_fedprompt.protocol.layout import Field, total_size
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.protections import (
    PROTECTIONS,
    Protection,
    facts_of,
    tolerated_colluders,
)
from secure_fedprompt.protocol.selection.task import Selection

MAX_COHORT = 1 << 14
MAX_VALUES = 1 << 25
MAX_ATTEMPTS = 200  # at one learning round
MAX_GRAPHS = 10  # the same on a regular graph: each attempt has one, and a chance to be opened
NO_SEED = NO_KEY = bytes(32)


def noise_colluders(wanted: int, clients: int, quorum: int) -> int:
    """Clients of a quorum whose noise does not count, since they can subtract it.

    Args:
        wanted: as configured; -1 is the c of ``tolerated_colluders``, and one at least, since every
            client knows its own noise.
    """
    return max(1, tolerated_colluders(clients, quorum)) if wanted < 0 else wanted


def most_attempts(regular: bool) -> int:
    """At one learning round. What is sent is the same each time, under fresh masks."""
    return MAX_GRAPHS if regular else MAX_ATTEMPTS


@dataclass(frozen=True)
class RoundPlan:
    """A round.

    Attributes:
        run, round: ``round`` grows with every attempt, an aborted one included.
        terms: digest of the run's ``RunTerms``, of which everything here but round, attempt,
            learning round, cohort, base and keys is a function.
        attempt: at this learning round, from 1.
        learning_round, rounds: position in the run; ``learning_round == rounds + 1`` is the
            final evaluation, whose layout holds counters only.
        protection: one of ``PROTECTIONS``.
        members: N, clients that the terms count; cohort: sorted names of those in this round.
        quorum: survivors that a round needs at every stage, a share of N.
        threshold: shares that reconstruct a secret. Equal to ``quorum`` on the complete graph.
        degree, graph_seed: 0 and zeros for the complete graph, else a k-regular graph.
        clip: C; max_weight: W_max; uniform: 1 if every client has weight 1; bucket: 1 if weights
            are rounded down to powers of two.
        base_digest: of the global prompt that the round starts from, as it is on the wire.
        parameters: of the homomorphic encryption; ``homomorphic.NONE`` for other protections.
        maker, election: who makes the key that the clients share (the cohort key, under masks the
            sum key), and how many keys the run had with it.
        key: its digest; zeros if the maker makes a new one in this round.
        grants: sorted names of the clients that are given the key in this round.
        selection: of the groups to upload, by server and helper; ``task.NONE`` without it.
        noise: that clients add to their updates; ``client_noise.NONE`` without it.
    """

    run: RunId
    terms: Digest
    round: U32
    attempt: U16
    learning_round: U32
    rounds: U32
    method: Annotated[str, Text(32)]
    protection: Annotated[str, Text(16)]
    settings_digest: Digest
    model_fingerprint: Digest
    classes_digest: Digest
    roster_digest: Digest
    base_digest: Digest
    members: U16
    cohort: Annotated[tuple[str, ...], Roll(MAX_COHORT)]
    quorum: U16
    threshold: U16
    degree: U16
    graph_seed: Digest
    clip: F64
    max_weight: U32
    uniform: U8
    bucket: U8
    layout: Annotated[tuple[Field, ...], Many(256)]
    parameters: Parameters
    maker: Annotated[str, Text(64)]
    election: U32
    key: Digest
    grants: Annotated[tuple[str, ...], Roll(MAX_COHORT)]
    selection: Selection
    noise: Noise

    @functools.cached_property
    def digest(self) -> bytes:
        return digest(Purpose.PLAN, encode_fields(self))

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The cohort's."""
        return frozenset(self.cohort)

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def points(self) -> dict[str, int]:
        """The Shamir abscissa of each client: its place in the cohort, from 1."""
        return {name: i for i, name in enumerate(self.cohort, start=1)}

    @property
    def encrypted(self) -> bool:
        """Whether the server adds ciphertexts, and the global prompt is sealed to it."""
        return self.facts.encrypted

    @property
    def facts(self) -> Protection:
        """Of its protection."""
        return facts_of(self.protection)

    @property
    def colluders(self) -> int:
        """c: clients that may collude, see ``Protection.tolerated``."""
        return self.facts.tolerated(bool(self.degree), self.members, self.quorum)

    @property
    def selecting(self) -> bool:
        """Whether server and helper choose what is uploaded."""
        return self.selection.scope != 0

    @property
    def training(self) -> bool:
        return self.learning_round <= self.rounds

    @property
    def telling(self) -> bool:
        """Whether its sum says anything about images: all but the zeros of some methods do."""
        return self.counting or (self.training and method_facts(self.method).shares)

    @property
    def counting(self) -> bool:
        """Whether it holds numbers of a client that no prompt changes: of its images."""
        counted = any(field.name in lay.METRICS for field in self.layout)
        return counted or not self.uniform

    def check(self) -> None:
        """Refuse a plan that contradicts itself or whose sums could overflow.

        Raises:
            PlanError: naming the field.
        """
        if "_checked" not in self.__dict__:  # once for each object: it is frozen
            self._check()
            self.__dict__["_checked"] = True

    def _check(self) -> None:
        n = len(self.cohort)
        if list(self.cohort) != sorted(self.cohort) or len(self.names) != n or not n:
            raise PlanError("cohort is not a sorted list of distinct names")
        if self.protection not in PROTECTIONS:
            raise PlanError(
                f"protection {self.protection!r} is not one of {', '.join(PROTECTIONS)}"
            )
        if self.facts.hides and not method_facts(self.method).hidden:
            raise PlanError(
                f"method {self.method} shows every client's prompt to the others: protection "
                f"{self.protection!r} would promise too much, only 'none' is allowed"
            )
        least = self.facts.least(self.members)
        if not least <= self.quorum <= n <= self.members:
            raise PlanError(
                f"quorum {self.quorum} and cohort {n} of {self.members} clients: a sum needs at "
                f"least {least} of them"
            )
        most = most_attempts(bool(self.degree))
        if not 1 <= self.attempt <= most:
            raise PlanError(f"attempt {self.attempt} at a learning round, at most {most}")
        if self.degree == 0 and self.threshold != self.quorum:
            raise PlanError(f"threshold {self.threshold} and quorum {self.quorum} differ")
        half = self.degree // 2
        if self.degree and (
            self.degree % 2 or not half + 1 < self.threshold <= self.degree + 1 < n
        ):
            raise PlanError(f"degree {self.degree}, threshold {self.threshold} with {n} clients")
        if not 1 <= self.learning_round <= self.rounds + 1:
            raise PlanError(f"learning round {self.learning_round} of {self.rounds}")
        if not (math.isfinite(self.clip) and self.clip > 0 and self.max_weight >= 1):
            raise PlanError(f"clip {self.clip} and max_weight {self.max_weight} must be positive")
        if (self.uniform and self.max_weight != 1) or (self.uniform and self.bucket):
            raise PlanError(f"uniform weights with max_weight {self.max_weight}")
        names = [field.name for field in self.layout]
        if len(set(names)) != len(names) or not {lay.WEIGHT, lay.CONTRIBUTORS} <= set(names):
            raise PlanError("layout lacks the weight or contributor count, or doubles a name")
        kinds = [field.update for field in self.layout]
        if kinds != sorted(kinds, reverse=True):
            raise PlanError("layout with counters before updates")
        if self.training != any(field.update for field in self.layout):
            raise PlanError("update fields in an evaluation round, or none in a training round")
        if total_size(self.layout) > MAX_VALUES:
            raise PlanError(f"layout of {total_size(self.layout)} values, at most {MAX_VALUES}")
        for field in self.layout:
            check_fits(field, self.members)
            if field.update and field.bound < self.clip * self.max_weight:
                raise PlanError(f"field {field.name!r} bound is below clip x max_weight")
        self._check_keying()
        self._check_selection()
        self._check_noise()

    def _check_noise(self) -> None:
        self.noise.check(self.quorum)
        if not self.noise.used:
            return
        if not self.facts.hides or not self.uniform or self.selection.federation:
            raise PlanError(
                f"client noise with protection {self.protection!r}, uniform {self.uniform} and "
                f"selection {self.selection.kind!r}: it needs protected sums, weight 1 for all and "
                "no counts of its own"
            )
        if any(field.name in lay.METRICS for field in self.layout):
            raise PlanError("metrics, which carry no noise, in a plan with client noise")
        updates = [field for field in self.layout if field.update]
        if len({field.frac for field in updates}) > 1:
            raise PlanError("client noise over tensors of different scales")
        if any(field.bound < self.clip + self.noise.room for field in updates):
            raise PlanError("the layout has no room for the noise")
        found = client_noise.effective(self.noise, self.layout)
        if found < 0.9 * self.noise.multiplier:
            raise PlanError(
                f"noise multiplier {self.noise.multiplier:g} is worth {found:.3g} on so coarse a "
                "grid: use more ring_bits or a larger dp_clip"
            )

    def _check_selection(self) -> None:
        chosen = self.selection
        chosen.check(len(self.cohort))
        updates = [field for field in self.layout if field.update]
        filled = {field.name for field in self.layout if field.name.startswith(lay.FILLED)}
        wanted = {lay.FILLED + field.name for field in updates} if chosen.federation else set()
        if filled != wanted:
            raise PlanError("counters of filled slots do not belong to this selection")
        if not self.selecting:
            return
        if not self.training or self.learning_round == 1:
            raise PlanError(f"a selection in learning round {self.learning_round}")
        if len(updates) != chosen.modalities or any(
            not field.shape or field.shape[0] != chosen.slots for field in updates
        ):
            raise PlanError("the layout's tensors are not the slots of the selection")
        if chosen.federation and not self.uniform:
            raise PlanError("slots are counted by clients, but weights are not uniform")
        for field in self.layout:
            if field.name in filled and tuple(field.shape) != (chosen.slots,):
                raise PlanError(f"counter {field.name!r} is not one for each slot")

    def _check_keying(self) -> None:
        chosen = self.parameters
        if chosen != homomorphic.choose(self.protection, chosen.clients, chosen.flood):
            raise PlanError(f"parameters {chosen} are no set for {self.protection}")
        if not self.facts.keyed:
            if self.maker or self.grants or self.election or self.key != NO_KEY:
                raise PlanError(f"a shared key under protection {self.protection}")
            return
        others = self.names - {self.maker}
        if self.encrypted:
            self._check_ciphertexts()
        if list(self.grants) != sorted(set(self.grants)) or not set(self.grants) <= others:
            raise PlanError("grants are doubled, unsorted, or not to other clients of the cohort")
        if self.grants and self.maker not in self.cohort:
            raise PlanError(f"key maker {self.maker!r} is not in the cohort")
        if self.key == NO_KEY and set(self.grants) != others:
            raise PlanError("a new key is not granted to everybody")

    def _check_ciphertexts(self) -> None:
        chosen = self.parameters
        if len(self.cohort) > chosen.clients:
            raise PlanError(f"{len(self.cohort)} clients, parameters are for {chosen.clients}")
        ciphertexts = 1 + -(-total_size(self.layout) // chosen.degree)
        if ciphertexts * homomorphic.summed_size(chosen) > MAX_FRAME:
            raise PlanError(
                f"an encrypted sum of {total_size(self.layout)} values does not fit a frame of "
                f"{MAX_FRAME} bytes: use masks, or a smaller prompt"
            )


@dataclass(frozen=True)
class PlanInputs:
    """What a plan may choose, besides what ``RunTerms`` fixes; fields as in ``RoundPlan``."""

    round: int
    attempt: int
    learning_round: int
    cohort: tuple[str, ...]
    base_digest: bytes
    maker: str = ""
    election: int = 0
    key: bytes = NO_KEY
    grants: tuple[str, ...] = ()
    helper: str = ""
    helper_key: bytes = NO_KEY
    helper_signature: bytes = bytes(64)

    @classmethod
    def of(cls, plan: RoundPlan) -> PlanInputs:
        """What a plan has chosen."""
        s = plan.selection
        return cls(
            plan.round, plan.attempt, plan.learning_round, plan.cohort, plan.base_digest,
            plan.maker, plan.election, plan.key, plan.grants,
            s.helper, s.helper_key, s.helper_signature,
        )  # fmt: skip
