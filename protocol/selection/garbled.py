"""Garbled circuits: half gates with free XOR, point-and-permute, over a batch of inputs.

An AND gate costs two 16-byte rows (Zahur, Rosulek and Evans, EUROCRYPT 2015), XOR and NOT nothing
(Kolesnikov and Schneider, ICALP 2008). Labels are hashed as pi(pi(x) xor i) xor pi(x) with a fixed
AES permutation (Guo, Katz, Wang and Yu, IEEE S&P 2020); its key belongs to the session, and
i = execution || gate never repeats in it.

Labels are (..., 2) arrays of 64-bit words; bit 0 of the first word is the colour. Every output wire
comes with a short hash of both its labels by colour, so that an evaluator notices tables that are
altered, swapped or belong to another session; the hashes say nothing about values.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import ECB
from numpy.typing import NDArray

from secure_fedprompt.protocol.errors import GarblingError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.selection.builder import Circuit, Layer
from secure_fedprompt.protocol.selection.oblivious_transfer import Bits, Labels

_ONE = np.uint64(1)
ROW = 16  # bytes of a label


class Hash:
    """Tweakable circular correlation robust hash of labels, in one session."""

    def __init__(self, session: bytes) -> None:
        key = digest(Purpose.GARBLING, session)[:16]
        self._cipher = Cipher(AES128(key), ECB()).encryptor()  # noqa: S305

    def __call__(self, labels: Labels, tweaks: Labels) -> Labels:
        """H(label, tweak) of every label; ``tweaks`` can be broadcast to ``labels``."""
        if not labels.size:
            return labels
        first = self._permute(labels)
        hashed = self._permute(first ^ tweaks)
        hashed ^= first
        return hashed

    def _permute(self, labels: Labels) -> Labels:
        out: Labels = np.empty(labels.size + 2, np.uint64)  # OpenSSL wants a block more
        self._cipher.update_into(labels.data.cast("B"), out.data.cast("B"))
        permuted: Labels = np.reshape(out[:-2], labels.shape)
        return permuted


def spread(colours: NDArray[np.uint64]) -> Labels:
    """(...) zeros and ones as (..., 2) words of all zeros or all ones, to select labels with.

    Written out, since numpy is slow where it broadcasts over a last axis of two.
    """
    masks = np.empty((*colours.shape, 2), np.uint64)
    np.negative(colours, out=masks[..., 0])
    masks[..., 1] = masks[..., 0]
    return masks


class Labelling:
    """Labels of all wires of a circuit in a batch, filled layer by layer."""

    def __init__(self, circuit: Circuit, execution: int, inputs: Labels) -> None:
        self.circuit, self.batch = circuit, inputs.shape[1]
        self.labels = np.empty((circuit.wires, self.batch, 2), np.uint64)
        self.labels[: len(inputs)] = inputs
        self.gates = 0  # AND gates so far
        self.largest = max([len(circuit.outputs), *(layer.gates for layer in circuit.layers)])
        self._tweaks = np.empty((2, self.largest * self.batch, 2), np.uint64)
        self._tweaks[..., 1] = execution
        self._tweaks[0, :, 0] = 2 * np.arange(self.largest * self.batch)
        self._tweaks[1, :, 0] = self._tweaks[0, :, 0] + _ONE

    def tweaks(self, gates: int) -> Labels:
        """Of the next gates, (2, gates * batch, 2): one for each input."""
        tweaks = self._tweaks[:, : gates * self.batch].copy()
        tweaks[..., 0] += np.uint64(2 * self.gates * self.batch)
        self.gates += gates
        return tweaks

    def open(self, layer: Layer, out: Labels) -> None:
        """XOR what the layer begins with; put the labels of its ANDs' inputs into ``out``."""
        w = self.labels
        for a, b, at in layer.xors:
            np.bitwise_xor(w.take(a, 0), w.take(b, 0), out=w[at])
        w.take(layer.inputs, 0, out=out, mode="clip")

    def close(self, layer: Layer, labels: Labels) -> None:
        self.labels[layer.out] = labels.reshape(layer.gates, self.batch, 2)

    def outputs(self) -> Labels:
        """Labels of the output wires that are not constant, (1, n, 2)."""
        wires = [w >> 1 for w in self.circuit.outputs if w >= 0]
        return self.labels[wires].reshape(1, -1, 2)


def garble(
    circuit: Circuit, hash_: Hash, execution: int, delta: Labels, zeros: Labels
) -> tuple[bytes, bytes, Bits]:
    """Garble for a batch.

    Args:
        delta: the free-XOR offset, (2,), with colour one.
        zeros: labels of 0 of all input wires, (input bits, batch, 2).

    Returns:
        tables, checks, and the garbler's shares of the outputs, (outputs, batch): a value is this
        xor the evaluator's colour.
    """
    run = Labelling(circuit, execution, zeros)
    tables = np.empty((circuit.ands, 2, run.batch, 2), np.uint64)
    offsets = np.tile(delta, (run.largest * run.batch, 1))
    for layer in circuit.layers:
        size = layer.gates * run.batch
        x = np.empty((2, 2, size, 2), np.uint64)  # label of 0 and 1, input a and b
        run.open(layer, x[0].reshape(2 * layer.gates, run.batch, 2))
        if not layer.gates:
            continue
        if layer.flips is not None:
            given = x[0].reshape(2 * layer.gates, run.batch, 2)
            given[layer.flips] ^= offsets[: run.batch]
        offset = offsets[:size]
        np.bitwise_xor(x[0], offset, out=x[1])
        at = slice(run.gates, run.gates + layer.gates)
        h = hash_(x, run.tweaks(layer.gates))
        mask = spread(x[0, ..., 0] & _ONE)
        rows = h[1]
        rows ^= h[0]
        out = rows[1] & mask[1]
        out ^= h[0, 0]
        out ^= h[0, 1]
        mask[1] &= offset
        rows[0] ^= mask[1]
        rows[1] ^= x[0, 0]
        mask[0] &= rows[0]
        out ^= mask[0]
        run.close(layer, out)
        tables[at] = rows.reshape(2, layer.gates, run.batch, 2).swapaxes(0, 1)
    labels = run.outputs()
    h = hash_(
        np.concatenate([labels, labels ^ delta]), run.tweaks(labels.size // (2 * run.batch))[0]
    )
    swap = (labels[0, :, 0] & _ONE).astype(bool)  # by colour: first that of the label of colour 0
    checks = np.where(swap, h[::-1, :, 0], h[..., 0])
    shares = np.empty((len(circuit.outputs), run.batch), bool)
    found = iter(swap.reshape(-1, run.batch))
    for i, wire in enumerate(circuit.outputs):
        shares[i] = bool(wire & 1) if wire < 0 else next(found) ^ bool(wire & 1)
    return tables.tobytes(), checks.tobytes(), shares


def evaluate(
    circuit: Circuit,
    hash_: Hash,
    execution: int,
    tables: bytes | memoryview,
    checks: bytes | memoryview,
    active: Labels,
) -> Bits:
    """Evaluate a batch.

    Args:
        active: labels of the input values, (input bits, batch, 2).

    Returns:
        the evaluator's shares of the outputs, (outputs, batch).

    Raises:
        GarblingError: the tables are not for this circuit and these labels.
    """
    run = Labelling(circuit, execution, active)
    count = sum(wire >= 0 for wire in circuit.outputs)
    cells = count * run.batch
    if len(tables) != 2 * ROW * circuit.ands * run.batch or len(checks) != ROW * cells:
        raise GarblingError(
            f"{len(tables)} and {len(checks)} bytes of tables and checks do not fit "
            f"{run.batch} times {circuit.name}"
        )
    rows_of = np.frombuffer(tables, np.uint64).reshape(circuit.ands, 2, run.batch, 2)
    for layer in circuit.layers:
        size = layer.gates * run.batch
        x = np.empty((2, size, 2), np.uint64)
        run.open(layer, x.reshape(2 * layer.gates, run.batch, 2))
        if not layer.gates:
            continue
        rows = rows_of[run.gates : run.gates + layer.gates].swapaxes(0, 1).reshape(2, size, 2)
        h = hash_(x, run.tweaks(layer.gates))
        mask = spread(x[..., 0] & _ONE)
        mask[0] &= rows[0]
        out = rows[1] ^ x[0]
        out &= mask[1]
        out ^= mask[0]
        out ^= h[0]
        out ^= h[1]
        run.close(layer, out)
    labels = run.outputs()
    colours = (labels[0, :, 0] & _ONE).astype(bool)
    expected = np.frombuffer(checks, np.uint64).reshape(2, cells)
    found = hash_(labels, run.tweaks(count)[0])[0, :, 0]
    if not np.array_equal(np.where(colours, expected[1], expected[0]), found):
        raise GarblingError(f"tables of {circuit.name} were altered or belong to other labels")
    shares = np.zeros((len(circuit.outputs), run.batch), bool)
    mine = [i for i, wire in enumerate(circuit.outputs) if wire >= 0]
    shares[mine] = colours.reshape(-1, run.batch)
    return shares
