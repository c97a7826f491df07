"""A client's memory across crashes: terms, rounds, uploads, survivor lists and what it opened.

Its rules are promises to the client's own user, so nothing that a server says resets them:

- (run, round) and (learning round, attempt) only grow.
- One opened sum per base: who has revealed for a learning round, or for its base in the same run,
  takes part in nothing else for it. It can only repeat the very frame that it sent.
- Until then an upload is repeated bit by bit, under fresh masks.
- Lists whose sums may be open are remembered with the base, so that near bases can be told.
- The prompt that follows from a sum which was checked is the only one for its learning round.

``file_journal`` has them on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.codec import encode_fields
from secure_fedprompt.protocol.errors import (
    OpenedError,
    ReplayError,
    SumError,
    UpdateReusedError,
)
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.terms import RunTerms

Record = dict[str, Any]
Names = tuple[str, ...]


@dataclass
class _Base:
    """What was done for one global prompt."""

    revealed_in: set[str] = field(default_factory=set)  # runs
    lists: list[tuple[str, int, Names]] = field(default_factory=list)  # run, round, survivors
    bounds: set[bytes] = field(default_factory=set)  # of the runs that these lists were signed in


@dataclass
class _Run:
    """What was done in one run."""

    terms: bytes = b""
    counts: str = ""
    round: int = 0
    learning_round: int = 0
    attempt: int = 0
    base: str = ""
    under: str = ""  # digest of the terms of the last round
    uploaded: int = 0
    vectors: dict[int, tuple[str, str, str, str]] = field(default_factory=dict)
    opened: dict[int, int] = field(default_factory=dict)  # learning round -> round
    made: dict[int, tuple[str, bool]] = field(default_factory=dict)  # by learning round
    distrusted: bool = False  # its server sent what is not a sum


@dataclass(frozen=True)
class _Note:
    """How prompts near one that a run gave are told.

    Attributes:
        starts: this client's own ones, in learning round 1, so that no nudge of theirs hides one
            prompt from the other. bounds: of the run. wide, accepted: see ``note_base``.
    """

    starts: tuple[Prompt, ...]
    tolerance: float
    bounds: bytes
    wide: bool
    accepted: bool


def _near(one: Prompt, other: NDArray[np.float32], tolerance: float) -> bool:
    return len(one) == len(other) and float(np.abs(one - other).max(initial=0.0)) <= tolerance


class MemoryJournal:
    """The rules, without the disk: for simulations and tests."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        self._bases: dict[str, _Base] = {}
        self._starts: dict[str, set[str]] = {}  # own starting prompt -> bounds of its runs
        self._notes: dict[tuple[str, str], _Note] = {}  # by run and base; not on the disk
        self._counted: list[tuple[str, Names]] = []  # run, survivors
        self._blobs: dict[str, bytes] = {}

    # -- terms -----------------------------------------------------------------------------------

    def knows(self, run: bytes) -> bool:
        """Whether this client has entered a round of the run before."""
        return self._runs.get(run.hex(), _Run()).round > 0

    def terms_of(self, run: bytes) -> bytes:
        """The terms that were accepted last, encoded; empty if none were."""
        return self._runs.get(run.hex(), _Run()).terms

    def other_terms(self, run: bytes, start: bytes | None) -> bytes:
        """Terms of the last other run that was taken part in, encoded; empty if there is none.

        Args:
            start: only of runs from this starting prompt.
        """
        near = {entry.partition(" ")[0] for entry in self._starts.get((start or b"").hex(), set())}
        others = [
            made for name, made in self._runs.items()
            if name != run.hex() and made.round > 0 and (start is None or name in near)
        ]  # fmt: skip
        return others[-1].terms if others else b""

    def bounds_of(self, start: bytes, other_than: bytes) -> set[bytes]:
        """Bounds of other runs that began from this starting prompt, and were taken part in."""
        found = self._starts.get(start.hex(), set())
        return {
            bytes.fromhex(bounds)
            for run, _, bounds in (entry.partition(" ") for entry in found)
            if run != other_than.hex() and self._runs[run].round > 0
        }

    def counts_of(self, other_than: bytes) -> set[str]:
        """How other runs, whatever their start, counted what does not depend on a prompt."""
        return {
            made.counts for run, made in self._runs.items()
            if run != other_than.hex() and made.round > 0 and made.counts
        }  # fmt: skip

    def accept_terms(self, terms: RunTerms, start: bytes) -> None:
        """Remember terms; ``start`` is the digest of this client's own starting prompt."""
        self._apply({"event": "terms", "run": terms.run.hex(), "terms": encode_fields(terms).hex(),
                     "start": start.hex(), "bounds": terms.bounds.hex(),
                     "counts": terms.counts})  # fmt: skip

    # -- a round ---------------------------------------------------------------------------------

    def progress(self, run: bytes) -> int:
        """The last learning round that was entered, or 0."""
        return self._runs.get(run.hex(), _Run()).learning_round

    def begin_round(self, plan: RoundPlan) -> None:
        """Enter a round.

        Raises:
            ReplayError: it is no later attempt or learning round than the last.
            OpenedError: this client has opened a sum of this learning round or base.
            SumError: the run's server has sent what is not the sum of the uploads.
        """
        self.check_trust(plan.run)
        run = self._runs.get(plan.run.hex(), _Run())
        short = plan.run.hex()[:8]
        if plan.round <= run.round:
            raise ReplayError(
                f"round {plan.round} of run {short} is not after round {run.round}, "
                "which this client has entered already"
            )
        place, last = (plan.learning_round, plan.attempt), (run.learning_round, run.attempt)
        if place <= last:
            raise ReplayError(
                f"learning round {place[0]}, attempt {place[1]} of run {short} is not after "
                f"learning round {last[0]}, attempt {last[1]}"
            )
        if plan.learning_round in run.opened:
            raise OpenedError(
                f"a sum of learning round {plan.learning_round} of run {short} was opened in round "
                f"{run.opened[plan.learning_round]}: a second one could be subtracted from it"
            )
        opened_in = self._bases.get(plan.base_digest.hex(), _Base()).revealed_in
        again = plan.run.hex() in opened_in or (opened_in and plan.learning_round > 1)
        if again and method_facts(plan.method).shares:
            raise OpenedError(
                f"a sum of the global prompt of learning round {plan.learning_round} was opened "
                "before: a second one could be subtracted from it"
            )
        if run.learning_round == plan.learning_round and run.base != plan.base_digest.hex():
            raise ReplayError(
                f"learning round {plan.learning_round} begins from another prompt than before"
            )
        if run.base == plan.base_digest.hex() and run.under != plan.terms.hex():
            raise ReplayError(  # or each of two rosters could open a sum of it
                f"learning round {plan.learning_round} was begun under other terms: it must end "
                "before the roster changes"
            )
        self._apply({"event": "round", "run": plan.run.hex(), "round": plan.round,
                     "learning_round": plan.learning_round, "attempt": plan.attempt,
                     "base": plan.base_digest.hex(), "terms": plan.terms.hex()})  # fmt: skip
        if place[0] > last[0]:
            self.forget(plan.run)

    def note_base(
        self,
        plan: RoundPlan,
        prompts: Sequence[Prompt],
        tolerance: float,
        bounds: bytes,
        *,
        wide: bool = False,
        accepted: bool = False,
    ) -> set[bytes]:
        """Remember the prompt of a round, and how those that are near it are told: which are is
        found when a list is judged, since others may have been signed by then.

        Args:
            prompts: flat float32; in learning round 1 also the client's own start.
            tolerance: largest difference between values of near prompts.
            bounds: of the run, see ``RunTerms.bounds``.
            wide: every prompt of another run counts as near. One of another length always does,
                since it may be the same one to another method, or a part of it.
            accepted: neither, by the operator's word; nor what other runs counted.

        Returns:
            other bounds under which lists of a near prompt were signed.
        """
        name = plan.base_digest.hex()
        mine = [prompt.astype("<f4") for prompt in prompts]
        for kind, prompt in zip(("base", "start"), mine, strict=False):
            if self._get(f"{kind}-{name[:32]}") is None:
                self._put(f"{kind}-{name[:32]}", prompt.tobytes())
        key = plan.run.hex(), name
        before = self._notes.get(key, _Note((), 0.0, b"", False, True))
        self._notes[key] = _Note(
            tuple(mine[1:]), max(tolerance, before.tolerance), bounds, wide or before.wide,
            accepted and before.accepted,
        )  # fmt: skip
        used = set().union(*(self._bases[n].bounds for n in self._near_to(*key)))
        return used - {bounds}

    def _near_to(self, run: str, base: str) -> set[str]:
        """Bases near one that this run gave, itself included, of which something was done; all, as
        long as it is not known what this one is."""
        note = self._notes.get((run, base))
        if note is None:
            return set(self._bases)
        mine = [np.frombuffer(self._get(f"base-{base[:32]}") or b"", "<f4"), *note.starts]
        near = {base} & set(self._bases)
        for other in set(self._bases) - near:
            elsewhere = any(of != run for of, _, _ in self._bases[other].lists)
            for kept in (self._get(f"base-{other[:32]}"), self._get(f"start-{other[:32]}")):
                theirs = np.frombuffer(kept or b"", "<f4")
                unlike = kept is not None and len(theirs) != len(mine[0])
                if elsewhere and not note.accepted and (note.wide or unlike):
                    near.add(other)
                if kept is not None and any(_near(one, theirs, note.tolerance) for one in mine):
                    near.add(other)
        return near

    def near_lists(self, plan: RoundPlan) -> list[Names]:
        """Survivor lists, of other rounds, whose sums may be open for a base near the plan's."""
        if not plan.telling:
            return []
        own = plan.base_digest.hex()
        found = []
        for name in sorted(self._near_to(plan.run.hex(), own)):
            for run, number, survivors in self._bases[name].lists:
                other = (run, number) != (plan.run.hex(), plan.round)
                # Within a run quorums meet; of another one others may have opened what we signed.
                opened = run != plan.run.hex() or number in self._runs[run].opened.values()
                if other and (opened or name != own):
                    found.append(survivors)
        note = self._notes.get((plan.run.hex(), own))
        if plan.counting and not (note and note.accepted):
            found += self.counted_lists(plan.run)
        return found

    def signed_lists(self, run: bytes | None) -> list[Names]:
        """Survivor lists of a run whose sums tell of updates; of all runs if it is None."""
        every = [entry for made in self._bases.values() for entry in made.lists]
        return [names for of, _, names in every if run is None or of == run.hex()]

    def counted_lists(self, run: bytes) -> list[Names]:
        """Survivor lists of other runs whose sums held what no prompt changes."""
        return [names for of, names in self._counted if of != run.hex()]

    # -- an upload -------------------------------------------------------------------------------

    def keep_vector(self, plan: RoundPlan, data: bytes) -> None:
        """Keep what is uploaded for a learning round, before it leaves."""
        name = f"vector-{plan.run.hex()}"
        self._put(name, data)
        self._apply({"event": "vector", "run": plan.run.hex(), "terms": plan.terms.hex(),
                     "base": plan.base_digest.hex(), "learning_round": plan.learning_round,
                     "file": name, "digest": hashlib.sha256(data).hexdigest()})  # fmt: skip

    def vector(self, plan: RoundPlan) -> bytes | None:
        """What was uploaded for this learning round and base before, or None."""
        run = self._runs.get(plan.run.hex(), _Run())
        *of, name, known = run.vectors.get(plan.learning_round, ("", "", "", ""))
        data = self._get(name) if of == [plan.terms.hex(), plan.base_digest.hex()] else None
        same = data is not None and hashlib.sha256(data).hexdigest() == known
        return data if same else None

    def claim_upload(self, run: bytes, round: int) -> None:
        """Raises UpdateReusedError if something was uploaded in this round: its masks are used."""
        if round <= self._runs.get(run.hex(), _Run()).uploaded:
            raise UpdateReusedError(f"round {round} of run {run.hex()[:8]} was uploaded already")
        self._apply({"event": "upload", "run": run.hex(), "round": round})

    # -- opening ---------------------------------------------------------------------------------

    def record_survivors(self, plan: RoundPlan, survivors: Sequence[str], opening: bytes) -> None:
        """Keep a survivor list, and what this client can send to open its sum, before it signs.

        Lists of sums that tell nothing are not remembered beyond that.
        """
        if plan.telling:  # first: what can be opened must be on the list of lists
            note = self._notes.get((plan.run.hex(), plan.base_digest.hex()))
            self._apply({"event": "list", "run": plan.run.hex(), "round": plan.round,
                         "base": plan.base_digest.hex(), "survivors": list(survivors),
                         "counted": plan.counting,
                         "bounds": note.bounds.hex() if note else ""})  # fmt: skip
        self._put(f"opening-{plan.run.hex()}", opening)

    def keep_opening(self, plan: RoundPlan, opening: bytes) -> None:
        """Keep what this client tells of a sum that it has opened."""
        self._put(f"opening-{plan.run.hex()}", opening)

    def opening(self, run: bytes) -> bytes | None:
        """What was kept with the last survivor list of a run, until the learning round is over."""
        return self._get(f"opening-{run.hex()}")

    def revealed(self, plan: RoundPlan) -> bool:
        """Whether the sum of this very round is being opened."""
        run = self._runs.get(plan.run.hex(), _Run())
        return run.opened.get(plan.learning_round) == plan.round

    def record_reveal(self, plan: RoundPlan) -> None:
        """Note, before it is sent, that a sum is being opened.

        Raises:
            OpenedError: another one of this learning round was.
        """
        if self.revealed(plan):
            return
        before = self._runs.get(plan.run.hex(), _Run()).opened.get(plan.learning_round)
        if before is not None:
            raise OpenedError(
                f"a sum of learning round {plan.learning_round} was opened in round {before}"
            )
        self._apply({"event": "reveal", "run": plan.run.hex(), "round": plan.round,
                     "learning_round": plan.learning_round,
                     "base": plan.base_digest.hex()})  # fmt: skip

    def note_made(self, run: bytes, learning_round: int, prompt: bytes, *, own: bool) -> None:
        """Remember the digest of the prompt that a learning round begins from.

        Args:
            own: whether this client computed it, from a sum that it checked; else others did.

        Raises:
            OpenedError: it has computed another one.
        """
        known, mine = self.made(run, learning_round)
        if mine and known != prompt:
            raise OpenedError(f"a second prompt for learning round {learning_round}")
        if known != prompt:
            self._apply({"event": "made", "run": run.hex(), "learning_round": learning_round,
                         "prompt": prompt.hex(), "own": own})  # fmt: skip

    def made(self, run: bytes, learning_round: int) -> tuple[bytes, bool]:
        """That digest, or nothing if it is not known; and whether it is this client's own."""
        prompt, own = self._runs.get(run.hex(), _Run()).made.get(learning_round, ("", False))
        return bytes.fromhex(prompt), own

    def base(self, plan: RoundPlan) -> Prompt | None:
        """The global prompt of a plan that ``note_base`` has seen."""
        data = self._get(f"base-{plan.base_digest.hex()[:32]}")
        return None if data is None else np.frombuffer(data, "<f4").astype(np.float32)

    def keep_key(self, run: bytes, key: bytes) -> None:
        """Keep the key that checks the sums of a run; under encryption, that opens its prompts."""
        self._put(f"sums-{run.hex()}", key)

    def kept_key(self, run: bytes) -> bytes:
        """What was kept."""
        return self._get(f"sums-{run.hex()}") or b""

    def distrust(self, run: bytes) -> None:
        """Take part in a run no more: a sum of it was not what clients sent."""
        self._apply({"event": "distrust", "run": run.hex()})
        self.finish(run)

    def check_trust(self, run: bytes) -> None:
        """Raises SumError if the run's server has sent what is not the sum of the uploads."""
        if self._runs.get(run.hex(), _Run()).distrusted:
            raise SumError(
                f"run {run.hex()[:8]} is over for this client: what came back was no sum; begin a "
                "new run"
            )

    def finish(self, run: bytes) -> None:
        """A run has ended: what it kept on the disk goes."""
        self.forget(run)
        self._drop(f"sums-{run.hex()}")

    def forget(self, run: bytes) -> None:
        """A learning round is over: its vector and its opening are not needed any more."""
        self._drop(f"vector-{run.hex()}")
        self._drop(f"opening-{run.hex()}")

    # -- storage ---------------------------------------------------------------------------------

    def _put(self, name: str, data: bytes) -> None:
        self._blobs[name] = data

    def _get(self, name: str) -> bytes | None:
        return self._blobs.get(name)

    def _drop(self, name: str) -> None:
        self._blobs.pop(name, None)

    def _apply(self, record: Record) -> None:
        run = self._runs.setdefault(str(record["run"]), _Run())
        match record["event"]:
            case "terms":
                run.terms, run.counts = bytes.fromhex(record["terms"]), str(record["counts"])
                entry = f"{record['run']} {record['bounds']}"
                self._starts.setdefault(record["start"], set()).add(entry)
            case "round":
                run.round, run.attempt = int(record["round"]), int(record["attempt"])
                run.learning_round, run.base = int(record["learning_round"]), str(record["base"])
                run.under = str(record["terms"])
            case "vector":
                number = int(record["learning_round"])
                of = str(record["terms"]), str(record["base"])
                run.vectors[number] = (*of, str(record["file"]), str(record["digest"]))
            case "upload":
                run.uploaded = int(record["round"])
            case "list":
                made = self._bases.setdefault(str(record["base"]), _Base())
                names = tuple(map(str, record["survivors"]))
                made.lists.append((str(record["run"]), int(record["round"]), names))
                if record.get("counted", True):  # earlier releases did not say
                    self._counted.append((str(record["run"]), names))
                made.bounds.add(bytes.fromhex(record["bounds"]))
            case "reveal":
                run.opened[int(record["learning_round"])] = int(record["round"])
                made = self._bases.setdefault(str(record["base"]), _Base())
                made.revealed_in.add(str(record["run"]))
            case "made":
                made_here = str(record["prompt"]), bool(record["own"])
                run.made[int(record["learning_round"])] = made_here
            case "distrust":
                run.distrusted = True
            case event:
                raise ValueError(f"unknown event {event!r}")
