"""Boolean circuits of XOR and AND gates, built once and evaluated on many inputs at a time.

A wire is an int: twice its index, plus one if it is inverted, so NOT is free. ``FALSE`` and
``TRUE`` are constants, and gates on constants vanish. ``Builder.circuit`` orders gates by AND
depth: gates of one layer are independent, so an evaluator works on whole layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Wire = int
Word = list[Wire]  # least significant bit first
FALSE, TRUE = -2, -1
Index = NDArray[np.int64]
Bits = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Layer:
    """Gates that can be evaluated together: XOR groups one after another, then the ANDs. Outputs of
    a group have consecutive indices.

    Attributes:
        xors: groups of (inputs a, inputs b, where the outputs go), indices without inversion.
        gates: ANDs; inputs: (2 * gates,) first all a, then all b; out: where the outputs go.
        flips: positions in ``inputs`` of those that are inverted, or None if none is.
    """

    xors: tuple[tuple[Index, Index, slice], ...]
    gates: int
    inputs: Index
    out: slice
    flips: Index | None


@dataclass(frozen=True, eq=False)
class Circuit:
    """A circuit of two parties.

    Attributes:
        name: what it computes.
        garbler_bits, evaluator_bits: inputs of each; they are wires 0, 1, ... in this order.
        wires: how many there are.
        layers: in order; outputs: references with inversion, constants allowed.
    """

    name: str
    garbler_bits: int
    evaluator_bits: int
    wires: int
    layers: tuple[Layer, ...]
    outputs: tuple[Wire, ...]

    @property
    def ands(self) -> int:
        return sum(layer.gates for layer in self.layers)

    @property
    def depth(self) -> int:
        return sum(bool(layer.gates) for layer in self.layers)

    @property
    def size(self) -> int:
        """Bytes between the parties per evaluation: 32 for an AND gate, 16 for an input bit of the
        evaluator, 16 for checking an output bit."""
        return 32 * self.ands + 16 * self.evaluator_bits + 16 * len(self.outputs)

    def __str__(self) -> str:
        return f"{self.name}: {self.ands} AND gates in {self.depth} layers, {self.size} bytes"

    def evaluate(self, garbler: Bits, evaluator: Bits) -> Bits:
        """In the clear: the reference for garbled evaluation.

        Args:
            garbler, evaluator: (input bits, batch).

        Returns:
            (outputs, batch).
        """
        values = np.zeros((self.wires + 1, garbler.shape[1]), bool)
        values[: self.garbler_bits] = garbler
        values[self.garbler_bits : self.garbler_bits + self.evaluator_bits] = evaluator
        for layer in self.layers:
            for a, b, out in layer.xors:
                values[out] = values[a] ^ values[b]
            given = values[layer.inputs]
            if layer.flips is not None:
                given[layer.flips] ^= True
            values[layer.out] = given[: layer.gates] & given[layer.gates :]
        found = [values[w >> 1] ^ bool(w & 1) for w in self.outputs]  # FALSE >> 1 is -1: all False
        return np.array(found, bool).reshape(len(found), garbler.shape[1])


class Builder:
    """Collects gates; words are little-endian lists of wires."""

    def __init__(self, garbler_bits: int, evaluator_bits: int) -> None:
        self._sizes = garbler_bits, evaluator_bits
        count = garbler_bits + evaluator_bits
        self._depth, self._step = [0] * count, [0] * count  # AND depth, XOR steps within it
        self._xors: list[tuple[int, int, int]] = []
        self._ands: list[tuple[Wire, Wire, int]] = []

    def inputs(self) -> tuple[Word, Word]:
        """The garbler's and the evaluator's bits."""
        own, total = self._sizes[0], sum(self._sizes)
        return [2 * i for i in range(own)], [2 * i for i in range(own, total)]

    # -- gates -----------------------------------------------------------------------------------

    def xor(self, a: Wire, b: Wire) -> Wire:
        if a < 0 or b < 0:
            constant, other = (a, b) if a < 0 else (b, a)
            return other ^ 1 if constant == TRUE else other
        if a >> 1 == b >> 1:
            return TRUE if a != b else FALSE
        i, j = a >> 1, b >> 1
        depth = max(self._depth[i], self._depth[j])
        step = 1 + max(self._step[k] if self._depth[k] == depth else 0 for k in (i, j))
        self._xors.append((i, j, self._new(depth, step)))
        return 2 * self._xors[-1][2] + ((a ^ b) & 1)

    def land(self, a: Wire, b: Wire) -> Wire:
        if a < 0 or b < 0:
            constant, other = (a, b) if a < 0 else (b, a)
            return other if constant == TRUE else FALSE
        if a >> 1 == b >> 1:
            return a if a == b else FALSE
        depth = 1 + max(self._depth[a >> 1], self._depth[b >> 1])
        self._ands.append((a, b, self._new(depth, 0)))
        return 2 * self._ands[-1][2]

    def lnot(self, a: Wire) -> Wire:
        return a ^ 1

    def _new(self, depth: int, step: int) -> int:
        self._depth.append(depth)
        self._step.append(step)
        return len(self._depth) - 1

    # -- arithmetic ------------------------------------------------------------------------------

    def full_add(self, a: Wire, b: Wire, c: Wire) -> tuple[Wire, Wire]:
        """Sum and carry, one AND gate (Boyar, Peralta and Pochuev 2000)."""
        ac = self.xor(a, c)
        carry = self.xor(c, self.land(ac, self.xor(b, c)))
        return self.xor(ac, b), carry

    def add(self, a: Word, b: Word) -> Word:
        """a + b modulo 2^n, n - 1 AND gates."""
        total, carry = [], FALSE
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if i == len(a) - 1:
                total.append(self.xor(self.xor(x, y), carry))
            else:
                s, carry = self.full_add(x, y, carry)
                total.append(s)
        return total

    def greater(self, a: Word, b: Word, or_equal: bool = False) -> Wire:
        """a > b, unsigned: the carry of a + ~b. n AND gates."""
        carry = TRUE if or_equal else FALSE
        for x, y in zip(a, b, strict=True):
            _, carry = self.full_add(x, self.lnot(y), carry)
        return carry

    def choose(self, bit: Wire, a: Word, b: Word) -> Word:
        """a if bit else b, one AND gate a bit."""
        return [self.xor(y, self.land(bit, self.xor(x, y))) for x, y in zip(a, b, strict=True)]

    def all_of(self, wires: Sequence[Wire]) -> Wire:
        """Conjunction, as a balanced tree."""
        left = list(wires) or [TRUE]
        while len(left) > 1:
            pairs = [self.land(x, y) for x, y in zip(left[::2], left[1::2], strict=False)]
            left = pairs + left[len(pairs) * 2 :]
        return left[0]

    def equals(self, word: Word, value: int) -> Wire:
        """word == value, a constant."""
        return self.all_of([w if value >> i & 1 else self.lnot(w) for i, w in enumerate(word)])

    def count(self, wires: Sequence[Wire], start: int = 0) -> Word:
        """start + how many are set, by a carry-save tree (Wallace 1964): one AND a full adder.

        Every bit of the result is there, so it never overflows.
        """
        width = (start + len(wires)).bit_length()
        columns: list[Word] = [[TRUE] if start >> i & 1 else [] for i in range(width + 1)]
        columns[0] = list(wires) + columns[0]
        while any(len(column) > 2 for column in columns):
            after: list[Word] = [[] for _ in columns]
            for i, column in enumerate(columns):
                while len(column) > 2:
                    s, carry = self.full_add(column.pop(0), column.pop(0), column.pop(0))
                    after[i].append(s)
                    if i < width:
                        after[i + 1].append(carry)
                after[i] += column
            columns = after
        total, carry = [], FALSE
        for column in columns[:width]:
            x, y = (*column, FALSE, FALSE)[:2]
            s, carry = self.full_add(x, y, carry)
            total.append(s)
        return total

    # -- the end ---------------------------------------------------------------------------------

    def circuit(self, name: str, outputs: Sequence[Wire]) -> Circuit:
        """Order the gates by layers, without those that no output needs."""
        needed = self._needed(outputs)
        place = {i: i for i in range(sum(self._sizes))}  # index here -> index in the circuit
        depths = range(max([self._depth[i] for i in needed], default=0) + 1)
        xors: dict[int, dict[int, list[tuple[int, int, int]]]] = {d: {} for d in depths}
        ands: dict[int, list[tuple[Wire, Wire, int]]] = {d: [] for d in depths}
        for gate in self._xors:
            if gate[2] in needed:
                xors[self._depth[gate[2]]].setdefault(self._step[gate[2]], []).append(gate)
        for a, b, out in self._ands:
            if out in needed:
                ands[self._depth[out] - 1].append((a, b, out))

        def put(gates: Sequence[tuple[int, int, int]]) -> slice:
            start = len(place)
            place.update((gate[2], start + i) for i, gate in enumerate(gates))
            return slice(start, len(place))

        layers = []
        for depth in depths:
            groups = []
            for _, group in sorted(xors[depth].items()):
                left, right = (np.array([place[gate[i]] for gate in group]) for i in range(2))
                groups.append((left, right, put(group)))
            gates = ands[depth]
            wires = [gate[i] for i in range(2) for gate in gates]
            flips = np.flatnonzero([w & 1 for w in wires])
            inputs = np.array([place[w >> 1] for w in wires], np.int64)
            layers.append(
                Layer(tuple(groups), len(gates), inputs, put(gates), flips if len(flips) else None)
            )
        ends = tuple(2 * place[w >> 1] + (w & 1) if w >= 0 else w for w in outputs)
        return Circuit(name, *self._sizes, len(place), tuple(layers), ends)

    def _needed(self, outputs: Sequence[Wire]) -> set[int]:
        """Indices of the wires that the outputs depend on."""
        sources = {out: (a, b) for a, b, out in self._xors}
        sources |= {out: (a >> 1, b >> 1) for a, b, out in self._ands}
        needed: set[int] = set()
        left = [w >> 1 for w in outputs if w >= 0]
        while left:
            wire = left.pop()
            if wire not in needed:
                needed.add(wire)
                left += sources.get(wire, ())
        return needed
