"""The server's side of a secure selection: it garbles, on shares that mean nothing to it.

It holds one additive share of every key and one XOR share of every outcome, each uniform on its
own; the helper holds the others, the owners receive both of theirs. See docs/secure-selection.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import FieldError, UnexpectedMessageError
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection.parties import Garbler
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.selection.task import Task, session_of
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.serve import Outbox


class Selector:
    """One selection. ``start``, then ``share`` for every client, ``evaluate``, and ``on``.

    Attributes:
        refused: owners whose shares the helper could not use; they are left out.
        outcomes: frames for the owners, once it is done.
    """

    def __init__(self, plan: RoundPlan, run_keys: Mapping[str, m.Ready], entropy: Entropy) -> None:
        self.plan, self._run_keys = plan, run_keys
        self.helper = plan.selection.helper
        self._garbler = Garbler(session_of(plan.digest), entropy)
        self._shares: dict[str, Keys] = {}
        self._boxes: dict[str, bytes] = {}
        self._task: Task | None = None
        self._answered = False
        self._ours: dict[str, bytes] | None = None
        self.refused: tuple[str, ...] = ()
        self.outcomes: Outbox | None = None

    def start(self) -> Outbox:
        return [(self.helper, m.HelperPlan(self.plan.run, self.plan.round, self.plan))]

    def share(self, sender: str, message: m.KeyShares) -> None:
        """Take one client's shares.

        Raises:
            FieldError: of another size than the plan's groups.
        """
        chosen = self.plan.selection
        words = chosen.modalities * chosen.groups
        if len(message.share) != 4 * words or len(message.box) != m.SEED_BOX:
            raise FieldError(
                f"key shares of {len(message.share)} bytes in a box of {len(message.box)}, "
                f"{4 * words} and {m.SEED_BOX} expected"
            )
        share = np.frombuffer(message.share, "<u4").astype(np.uint32)
        self._shares[sender] = share.reshape(chosen.modalities, chosen.groups)
        self._boxes[sender] = bytes(message.box)

    def evaluate(self, owners: tuple[str, ...]) -> Outbox:
        """Begin the evaluation over those who sent their shares."""
        self._task = Task(self.plan.selection, owners)
        return self._inputs() if self._answered else []  # else with the answer

    def _inputs(self) -> Outbox:
        assert self._task is not None
        plan, owners = self.plan, self._task.owners
        ready = tuple(self._run_keys[name] for name in owners)
        boxes = b"".join(self._boxes[name] for name in owners)
        return [(self.helper, m.HelperInputs(plan.run, plan.round, ready, boxes))]

    def on(self, message: m.Message) -> Outbox:
        """Take a frame of the helper.

        Raises:
            ProtocolError: it is refused; the round cannot go on with this helper.
        """
        plan = self.plan
        match message:
            case m.HelperOffer():
                answer = m.HelperAnswer(plan.run, plan.round, self._garbler.answer(message.offer))
                self._answered = True
                return [(self.helper, answer), *(self._inputs() if self._task else [])]
            case m.HelperChoices() if self._task is not None and self._ours is None:
                if not set(message.refused) <= set(self._task.owners):
                    raise FieldError("the helper refuses clients that sent it nothing")
                left = tuple(n for n in self._task.owners if n not in message.refused)
                if len(left) < plan.quorum:
                    raise FieldError(f"the helper leaves out {len(message.refused)} owners")
                self.refused, self._task = tuple(message.refused), Task(plan.selection, left)
                inputs = self._task.inputs(self._shares)
                tables, ours = self._garbler.garble(self._task.circuit, inputs, message.choices)
                self._ours = self._task.outcomes(ours)
                return [(self.helper, m.HelperTables(plan.run, plan.round, tables))]
            case m.HelperOutcome() if self._task is not None and self._ours is not None:
                owners, size = self._task.owners, self._task.outcome_size + m.TAG
                if len(message.boxes) != size * len(owners):
                    raise FieldError(f"{len(message.boxes)} bytes of outcomes for {len(owners)}")
                boxes = [
                    bytes(message.boxes[at : at + size])
                    for at in range(0, size * len(owners), size)
                ]
                self.outcomes = [
                    (name, m.Outcome(plan.run, plan.round, self._ours[name], box))
                    for name, box in zip(owners, boxes, strict=True)
                ]
                return []
        raise UnexpectedMessageError(f"{type(message).__name__} of the helper is out of place")
