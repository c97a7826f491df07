"""The terms of a run: everything on which the meaning of its sums depends, fixed before the first.

A server that may vary a bound, a clip or a training setting from sum to sum turns saturation into
an oracle and solves for every client. So the server signs one ``RunTerms``, each client's policy
judges it once and writes its digest to its journal, and every plan carries that digest. A plan is
then a function of the terms and of what a round must choose: ``RunTerms.plan``. Clients compute it
themselves and take no other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

from secure_fedprompt.protocol import client_noise, homomorphic, masking
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.codec import (
    F64,
    U8,
    U16,
    U32,
    Blob,
    Digest,
    Many,
    Name,
    RunId,
    Text,
    UpTo,
    encode_fields,
)
from secure_fedprompt.protocol.errors import ConfigError, PlanError, TermsError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import Layout, TensorSpec
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import (
    MAX_COHORT,
    MAX_VALUES,
    NO_KEY,
    NO_SEED,
    PlanInputs,
    RoundPlan,
    most_attempts,
)
from secure_fedprompt.protocol.protections import (
    PROTECTIONS,
    Protection,
    facts_of,
)
from secure_fedprompt.protocol.ring import MAX_BITS, MIN_BITS
from secure_fedprompt.protocol.selection import task
from secure_fedprompt.protocol.selection.task import Selection
from secure_fedprompt.protocol.settings import MethodSettings, Metrics, Weights, choices

FEDERATION = 1 + task.SCOPES.index("federation")
_MEMBERS = ("roster_digest", "clients", "quorum", "colluders", "makers", "helpers")


@dataclass(frozen=True)
class RunTerms:
    """One run.

    Attributes:
        settings: of the method, the whole of them, canonical JSON. A schedule is a function of the
            learning round.
        start: digest of the prompt that the run starts from.
        nonces: digest of all clients' nonces, which they committed to before they saw any other's.
        clients: N, members that may take part; every threshold is a share of it.
        quorum: updates of a sum at every stage, in every attempt, whatever the cohort.
        colluders: c that the quorum and the graph tolerate; see ``tolerated``.
        attempts: most attempts at one learning round.
        tensors: what is uploaded; ring_bits, clip, weights, max_weight, max_seen: its bounds.
        metrics: "off", "final" (counted in one evaluation sum at the end) or "rounds".
        regular: 1 for a k-regular graph, for shares ``dropout`` and ``corruption`` of N.
        flood: of ckks.
        makers, helpers: who may make the clients' key, and who may be the helper, in this order.
        selection: scope as in ``Selection``; fillers likewise; keep likewise, 0 is slots x cohort.
        noise: that clients add to every training sum.
        stage_seconds, training_seconds: deadlines. upload_after: seconds from a plan before which
            nobody uploads.
    """

    run: RunId
    settings: Annotated[Blob, UpTo(1 << 16)]
    model_fingerprint: Digest
    classes_digest: Digest
    roster_digest: Digest
    start: Digest
    nonces: Digest
    clients: U16
    quorum: U16
    colluders: U16
    rounds: U32
    attempts: U8
    protection: Annotated[str, Text(16)]
    tensors: Annotated[tuple[TensorSpec, ...], Many(128)]
    ring_bits: U8
    clip: F64
    weights: Annotated[str, Text(16)]
    max_weight: U32
    max_seen: U32
    metrics: Annotated[str, Text(16)]
    regular: U8
    dropout: F64
    corruption: F64
    flood: U8
    makers: Annotated[tuple[Name, ...], Many(MAX_COHORT)]
    helpers: Annotated[tuple[Name, ...], Many(MAX_COHORT)]
    selection: U8
    keep: U32
    fillers: U16
    noise: Noise
    stage_seconds: F64
    training_seconds: F64
    upload_after: F64

    @functools.cached_property
    def digest(self) -> bytes:
        return digest(Purpose.TERMS, encode_fields(self))

    @functools.cached_property
    def method(self) -> MethodSettings:
        """The settings, decoded.

        Raises:
            ConfigError: they are not understood.
        """
        return MethodSettings.from_bytes(self.settings)

    @functools.cached_property
    def bounds(self) -> bytes:
        """Digest of what a sum of one base means: two runs from one start must agree in it."""
        numbers = f"{self.clip!r} {self.max_weight} {self.max_seen} {self.weights} {self.metrics}"
        form = (self._form,) if self._form else ()
        return digest(
            Purpose.BOUNDS, self.settings, numbers.encode(), encode_fields(self.noise), *form
        )

    @property
    def _form(self) -> bytes:
        """Digest of what another program trains by, which no setting of ours says."""
        return b"" if method_facts(self.method.method).own_start else self.classes_digest

    @property
    def counts(self) -> str:
        """What is counted of a client and where it is cut off; empty if nothing is."""
        weights = "" if self.uniform else f"{self.weights} up to {self.max_weight}"
        seen = "" if self.metrics == "off" else f"{self.metrics} up to {self.max_seen}"
        by = f" by {self._form.hex()[:16]}" if self._form and weights else ""
        return f"{weights}{by}; {seen}" if weights or seen else ""

    def differences(self, before: RunTerms) -> str:
        """What other terms said of settings and bounds, and these say now."""
        now, then = self.method, before.method
        pairs = [(name, getattr(then, name), getattr(now, name)) for name in now.__struct_fields__]
        names = ("clip", "max_weight", "max_seen", "weights", "metrics")
        pairs += [(name, getattr(before, name), getattr(self, name)) for name in names]
        pairs += [("dp_noise", before.noise.multiplier, self.noise.multiplier),
                  ("dp_clip", before.noise.clip, self.noise.clip)]  # fmt: skip
        return ", ".join(f"{name} = {a!r} (now {b!r})" for name, a, b in pairs if a != b)

    @property
    def evaluations(self) -> int:
        """Sums of counters after the last learning round."""
        return int(self.metrics != "off")

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def check(self) -> None:
        """Refuse terms that contradict themselves, or under which a sum could overflow.

        Raises:
            TermsError: naming the field.
        """
        for name, hint in (("weights", Weights), ("metrics", Metrics)):
            if (value := getattr(self, name)) not in (known := choices(hint)):
                raise TermsError(f"terms: {name} = {value!r}: not one of {known}")
        if self.protection not in PROTECTIONS:
            raise TermsError(f"terms: protection {self.protection!r} is not known")
        n = self.clients
        ranges = {
            "clients": 1 <= n <= MAX_COHORT, "ring_bits": MIN_BITS <= self.ring_bits <= MAX_BITS,
            "clip": 0 < self.clip <= 1e6, "max_weight": self.max_weight >= 1,
            "max_seen": self.max_seen >= 1, "regular": self.regular <= 1,
            "dropout": 0 <= self.dropout < 1, "corruption": 0 <= self.corruption < 1,
            "selection": self.selection <= FEDERATION,
            "noise": 0 <= self.noise.clip <= 1e6 and 0 <= self.noise.multiplier <= 1e6,
            "stage_seconds": 0 < self.stage_seconds <= 1e9,
            "training_seconds": 0 < self.training_seconds <= 1e9,
            "tensors": 1 <= sum(tensor.size for tensor in self.tensors) <= MAX_VALUES,
        }  # fmt: skip
        for name, good in ranges.items():
            if not good:
                raise TermsError(f"terms: {name} = {_short(getattr(self, name))} is out of range")
        least = self.facts.least(n)
        if not least <= self.quorum <= n:
            raise TermsError(f"terms: quorum {self.quorum} of {n} clients, at least {least}")
        found = self.facts.tolerated(bool(self.regular), n, self.quorum, self.corruption)
        if self.colluders != found:
            raise TermsError(f"terms: colluders {self.colluders}, they tolerate {found}")
        most = most_attempts(bool(self.regular))
        if not 1 <= self.attempts <= most:
            raise TermsError(f"terms: {self.attempts} attempts, 1 to {most} are allowed")
        if self.uniform and self.max_weight != 1:
            raise TermsError(f"terms: uniform weights with max_weight {self.max_weight}")
        if not 0 <= self.upload_after < self.training_seconds:
            raise TermsError(
                f"terms: upload_after {self.upload_after:g} s is not below training_seconds "
                f"{self.training_seconds:g}"
            )
        try:
            settings = self.method
            rounds = [1, self.rounds, *([self.rounds + 1] if self.evaluations else [])]
            for number in {r for r in rounds if r}:
                self.plan(self.sample(number)).check()
        except (ConfigError, PlanError) as error:
            raise TermsError(f"terms: {error}") from None
        if settings.to_bytes() != bytes(self.settings):
            raise TermsError("terms: settings are not in their one canonical form")

    @property
    def facts(self) -> Protection:
        """Of its protection."""
        return facts_of(self.protection)

    def sample(self, number: int) -> PlanInputs:
        """What a learning round in which everybody takes part could choose, under other names."""
        names = tuple(f"{i:05d}" for i in range(self.clients))
        maker = names[0] if self.facts.keyed else ""
        helper = names[0] if self.selecting(number) else ""
        return PlanInputs(
            1, 1, number, names, bytes(32), maker, 0, NO_KEY, names[1:] if maker else (), helper
        )

    def selecting(self, learning_round: int) -> bool:
        """Whether server and helper select in this learning round."""
        return bool(self.selection) and 1 < learning_round <= self.rounds

    def layout(self, learning_round: int) -> Layout:
        """Of the uploads of a learning round, whoever takes part: sized for N.

        Raises:
            PlanError: no layout fits.
        """
        training = learning_round <= self.rounds
        federation = self.selecting(learning_round) and self.selection == FEDERATION
        return size_layout(
            self.tensors if training else (),
            self.clients,
            clip=self.clip,
            max_weight=self.max_weight,
            max_seen=self.max_seen,
            ring_bits=self.ring_bits,
            metrics=self.metrics == "rounds" or (self.metrics == "final" and not training),
            filled=self.method.fedmgp.slots if federation else 0,
            noise=self.noise.room if training else 0.0,
        )

    def _selection(self, chosen: PlanInputs) -> Selection:
        if not self.selecting(chosen.learning_round):
            return task.NONE
        o, n = self.method.fedmgp, len(chosen.cohort)
        federation = self.selection == FEDERATION
        return Selection(
            scope=self.selection,
            modalities=2 if o.modality == "both" else 1,
            groups=o.groups,
            slots=o.slots,
            keep=min(self.keep or o.slots * n, o.groups * n) if federation else 0,
            fillers=self.fillers if federation else 0,
            helper=chosen.helper,
            helper_key=chosen.helper_key,
            helper_signature=chosen.helper_signature,
        )

    def plan(self, chosen: PlanInputs) -> RoundPlan:
        """The one plan of these terms for what a round chooses.

        Raises:
            PlanError: no graph, layout or parameter set fits.
        """
        n, training = len(chosen.cohort), chosen.learning_round <= self.rounds
        degree, threshold, seed = 0, self.quorum, NO_SEED
        if self.regular and self.facts.masked:
            degree, threshold = masking.choose_degree(
                n, dropout=self.dropout, corruption=min(self.corruption * self.clients / n, 0.99)
            )
            numbers = f"{chosen.learning_round} {chosen.attempt}".encode()
            seed = digest(Purpose.GRAPH, self.run, self.nonces, numbers)
        return RoundPlan(
            run=self.run,
            terms=self.digest,
            round=chosen.round,
            attempt=chosen.attempt,
            learning_round=chosen.learning_round,
            rounds=self.rounds,
            method=self.method.method,
            protection=self.protection,
            settings_digest=digest(Purpose.SETTINGS, self.settings),
            model_fingerprint=self.model_fingerprint,
            classes_digest=self.classes_digest,
            roster_digest=self.roster_digest,
            base_digest=chosen.base_digest,
            members=self.clients,
            cohort=chosen.cohort,
            quorum=self.quorum,
            threshold=threshold,
            degree=degree,
            graph_seed=seed,
            clip=self.clip,
            max_weight=self.max_weight,
            uniform=int(self.uniform),
            bucket=int(self.weights == "bucket"),
            layout=self._layouts(chosen.learning_round),
            parameters=homomorphic.choose(self.protection, self.clients, self.flood),
            maker=chosen.maker,
            election=chosen.election,
            key=chosen.key,
            grants=chosen.grants,
            selection=self._selection(chosen),
            noise=self.noise if training else client_noise.NONE,
        )

    def _layouts(self, learning_round: int) -> Layout:
        """``layout``, computed once for each of its three forms."""
        form = min(learning_round, 2) if learning_round <= self.rounds else 3
        made: dict[int, Layout] = self.__dict__.setdefault("_made", {})
        if form not in made:
            made[form] = self.layout(learning_round)
        return made[form]

    def admit(self, plan: RoundPlan) -> None:
        """Refuse a plan that is not the one of these terms.

        Raises:
            TermsError: naming the first field that differs, with both values.
        """
        if plan.run != self.run or plan.terms != self.digest:
            raise TermsError(
                f"plan is under terms {plan.terms.hex()[:16]}, agreed were {self.digest.hex()[:16]}"
            )
        last = self.rounds + self.evaluations
        if plan.learning_round > last:
            raise TermsError(
                f"plan is for learning round {plan.learning_round}, the last is {last}"
            )
        if plan.attempt > self.attempts:
            raise TermsError(
                f"plan is attempt {plan.attempt} at learning round {plan.learning_round}, the "
                f"terms allow {self.attempts}"
            )
        if not self.quorum <= len(plan.cohort) <= self.clients:
            raise TermsError(
                f"plan has a cohort of {len(plan.cohort)}, the terms allow {self.quorum} to "
                f"{self.clients}"
            )
        if plan.facts.keyed and plan.maker not in self.makers:
            raise TermsError(f"plan's key maker {plan.maker!r} is not one of the terms'")
        if plan.selecting and plan.selection.helper not in self.helpers:
            raise TermsError(f"plan's helper {plan.selection.helper!r} is not one of the terms'")
        expected = self.plan(PlanInputs.of(plan))
        if plan != expected:
            name = next(
                f.name for f in fields(plan) if getattr(plan, f.name) != getattr(expected, f.name)
            )
            raise TermsError(
                f"plan's {name} is {_short(getattr(plan, name))}, the terms say "
                f"{_short(getattr(expected, name))}"
            )

    def succeed(self, before: RunTerms) -> None:
        """Refuse new terms of a run unless only the roster changed, with what follows from it.

        Raises:
            TermsError: naming the field.
        """
        if self.roster_digest == before.roster_digest:
            raise TermsError("terms of a run changed, and its roster did not")
        if self.facts.encrypted:
            raise TermsError(
                f"under {self.protection} a run keeps its roster, since who leaves it could still "
                "open and seal its prompts: begin a new run from the last one (start_prompt)"
            )
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(before, field.name)
            if field.name not in _MEMBERS and mine != theirs:
                raise TermsError(
                    f"terms of a run changed in {field.name}: {_short(theirs)} became "
                    f"{_short(mine)}"
                )


def _short(value: object) -> str:
    text = value.hex()[:16] if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nonces_digest(nonces: Sequence[object]) -> bytes:
    """Of the opened nonces, by name."""
    return digest(Purpose.NONCES, *(encode_fields(nonce) for nonce in nonces))
