"""The two parties of a secure evaluation, without I/O: frames in, frames out.

    garbler                     evaluator
                 <-  Offer      once a session
      Answer     ->
                 <-  Choices    for every execution
      Garbled    ->

Afterwards each holds an XOR share of every output, uniform on its own. A session has its own
128-bit offset and base transfers; it lives in memory only. Against semi-honest parties that do not
collude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.codec import MAX_FRAME, U32, Blob, Digest, Printable, PublicKey, UpTo
from secure_fedprompt.protocol.edwards import POINT
from secure_fedprompt.protocol.errors import (
    FieldError,
    SelectionError,
    SessionError,
    TweakError,
)
from secure_fedprompt.protocol.expand import keystream
from secure_fedprompt.protocol.selection import garbled
from secure_fedprompt.protocol.selection.builder import Circuit
from secure_fedprompt.protocol.selection.oblivious_transfer import (
    KAPPA,
    BaseReceiver,
    BaseSender,
    Bits,
    CorrelatedReceiver,
    CorrelatedSender,
    Labels,
)
from secure_fedprompt.protocol.shamir import Entropy

Data = Annotated[Blob, UpTo(MAX_FRAME)]


@dataclass(frozen=True, repr=False)
class Offer(Printable):
    """The base transfers' common point."""

    session: Digest
    point: PublicKey


@dataclass(frozen=True, repr=False)
class Answer(Printable):
    """One point for each base transfer."""

    session: Digest
    points: Annotated[Blob, UpTo(POINT * KAPPA)]


@dataclass(frozen=True, repr=False)
class Choices(Printable):
    """The columns of one execution, with what they are checked by."""

    session: Digest
    execution: U32
    columns: Data


@dataclass(frozen=True, repr=False)
class Garbled(Printable):
    """One execution: ``seed`` expands to the active labels of the garbler's inputs."""

    session: Digest
    execution: U32
    seed: Digest
    tables: Data
    checks: Data


Frame = Offer | Answer | Choices | Garbled
F = TypeVar("F", Offer, Answer, Choices, Garbled)


class _Party:
    def __init__(self, session: bytes, entropy: Entropy) -> None:
        self.session, self._entropy = session, entropy
        self._hash = garbled.Hash(session)
        self._execution = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<private>)"

    def _check(self, frame: Frame) -> None:
        if frame.session != self.session:
            raise SessionError(
                f"{type(frame).__name__} of session {frame.session.hex()[:16]}, this is "
                f"{self.session.hex()[:16]}"
            )
        number = getattr(frame, "execution", self._execution)
        if number != self._execution:
            raise TweakError(
                f"{type(frame).__name__} for execution {number}, this is {self._execution}: "
                "replayed or out of order"
            )


class Garbler(_Party):
    """Holds one input, and the offset between the two labels of every wire.

    Args:
        session: 32 bytes on which the parties agree and that never come twice.
        entropy: source of random bytes.
    """

    def __init__(self, session: bytes, entropy: Entropy) -> None:
        super().__init__(session, entropy)
        self._delta: Labels = np.frombuffer(entropy(garbled.ROW), "<u8").astype(np.uint64)
        self._delta[0] |= np.uint64(1)
        self._transfers: CorrelatedSender | None = None

    def answer(self, offer: Offer) -> Answer:
        """Take part in the base transfers, once.

        Raises:
            SessionError, PointError, SelectionError
        """
        self._check(offer)
        if self._transfers is not None:
            raise SelectionError("a second offer in a session")
        choices = np.unpackbits(self._delta.view(np.uint8), bitorder="little").astype(bool)
        base = BaseReceiver(self.session, choices, offer.point, self._entropy)
        self._transfers = CorrelatedSender(self.session, choices, base.keys)
        return Answer(self.session, base.answer)

    def garble(self, circuit: Circuit, inputs: Bits, choices: Choices) -> tuple[Garbled, Bits]:
        """Garble one execution, (input bits, batch).

        Returns:
            the frame, and this party's shares of the outputs, (outputs, batch).

        Raises:
            SessionError, TweakError, FieldError, SelectionError
        """
        self._check(choices)
        _check_inputs(circuit.garbler_bits, inputs)
        if self._transfers is None:
            raise SelectionError("no base transfers yet")
        batch = inputs.shape[1]
        zeros = np.empty((circuit.garbler_bits + circuit.evaluator_bits, batch, 2), np.uint64)
        theirs = self._transfers.extend(choices.columns, circuit.evaluator_bits * batch)
        zeros[circuit.garbler_bits :] = theirs.reshape(-1, batch, 2)
        seed = self._entropy(32)
        own = _active(seed, circuit.garbler_bits, batch)
        mask = garbled.spread(inputs.astype(np.uint64))
        mask &= np.tile(self._delta, (batch, 1))
        zeros[: circuit.garbler_bits] = mask ^ own
        tables, checks, shares = garbled.garble(
            circuit, self._hash, self._execution, self._delta, zeros
        )
        frame = Garbled(self.session, self._execution, seed, tables, checks)
        self._execution += 1
        return frame, shares


class Evaluator(_Party):
    """Holds the other input, and one label of each wire."""

    def __init__(self, session: bytes, entropy: Entropy) -> None:
        super().__init__(session, entropy)
        self._base: BaseSender | None = BaseSender(session, entropy)
        self._offer = Offer(session, self._base.offer)
        self._transfers: CorrelatedReceiver | None = None
        self._pending: list[tuple[Circuit, Labels]] = []

    def offer(self) -> Offer:
        return self._offer

    def accept(self, answer: Answer) -> None:
        """End the base transfers, once.

        Raises:
            SessionError, PointError, FieldError, SelectionError
        """
        self._check(answer)
        if self._base is None:
            raise SelectionError("a second answer in a session")
        keys = self._base.keys(bytes(answer.points))
        self._transfers = CorrelatedReceiver(self.session, keys, self._entropy)
        self._base = None

    def choose(self, circuit: Circuit, inputs: Bits) -> Choices:
        """Begin an execution, (input bits, batch). Several may be under way, in order."""
        _check_inputs(circuit.evaluator_bits, inputs)
        if self._transfers is None:
            raise SelectionError("no base transfers yet")
        columns, labels = self._transfers.choose(inputs.reshape(-1))
        number = self._execution + len(self._pending)
        self._pending.append((circuit, labels.reshape(*inputs.shape, 2)))
        return Choices(self.session, number, columns)

    def evaluate(self, frame: Garbled) -> Bits:
        """End the oldest execution under way; this party's shares of the outputs.

        Raises:
            SessionError, TweakError, GarblingError, SelectionError
        """
        self._check(frame)
        if not self._pending:
            raise SelectionError("no execution is under way")
        circuit, labels = self._pending[0]
        own = _active(frame.seed, circuit.garbler_bits, labels.shape[1])
        active = np.concatenate([own, labels])
        shares = garbled.evaluate(
            circuit, self._hash, self._execution, frame.tables, frame.checks, active
        )
        self._pending.pop(0)
        self._execution += 1
        return shares


def _check_inputs(bits: int, inputs: NDArray[np.bool_]) -> None:
    if inputs.ndim != 2 or len(inputs) != bits or inputs.dtype != bool:
        raise FieldError(f"inputs of shape {inputs.shape}, ({bits}, batch) booleans expected")


def _active(seed: bytes, bits: int, batch: int) -> Labels:
    """The garbler's active labels. They hide its inputs: any value would have the same ones."""
    labels = np.frombuffer(keystream(seed, bits * batch * garbled.ROW), "<u8")
    return labels.reshape(bits, batch, 2).astype(np.uint64, copy=False)


def together(
    circuit: Circuit,
    garbler: Bits,
    evaluator: Bits,
    entropy: Entropy,
    tap: Callable[[Frame], Frame] = lambda frame: frame,
) -> Bits:
    """Run both parties in one process and open the outputs: for tests and examples.

    Args:
        garbler, evaluator: (input bits, batch).
        tap: sees every frame, and may replace it.
    """
    session = entropy(32)
    one, other = Garbler(session, entropy), Evaluator(session, entropy)
    other.accept(_tapped(tap, one.answer(_tapped(tap, other.offer()))))
    frame, ours = one.garble(circuit, garbler, _tapped(tap, other.choose(circuit, evaluator)))
    return ours ^ other.evaluate(_tapped(tap, frame))


def _tapped(tap: Callable[[Frame], Frame], frame: F) -> F:
    return tap(frame)  # type: ignore[return-value]
