"""Ring integers <-> slots of a homomorphic plaintext that holds more bits than one of them.

A slot holds an integer of magnitude at most ``limit``. Update values of b bits are stacked, as
many as fit; the counters, which use 32 bits, ride as digits of a few bits in the room that is
left above them. If that is too little, each takes a slot of its own. Sums of packed vectors unpack
to sums, exactly: an update's sum keeps within its b bits (``fixedpoint.check_fits``), and digits
leave room for the carries of every client.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol import ring
from secure_fedprompt.protocol.layout import Layout
from secure_fedprompt.protocol.ring import MAX_BITS

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """How a layout fills slots.

    Attributes:
        values, counters: how many the layout has.
        bits: width of a stacked value; stack: how many share a slot.
        digit: bits of a counter's digit in the room above, or 0 if counters have own slots.
        slots: slots that the vector needs.
    """

    values: int
    counters: int
    bits: int
    stack: int
    digit: int
    slots: int

    @classmethod
    def of(cls, layout: Layout, limit: int, clients: int) -> Packing:
        """Choose the packing of ``layout`` for sums of up to ``clients`` vectors.

        Args:
            layout: of the plan.
            limit: largest magnitude of a slot, at least 2^31.
            clients: most vectors in a sum.
        """
        return _packing(layout, limit, clients)

    @property
    def per_counter(self) -> int:
        """Digits of one counter."""
        return -(-MAX_BITS // self.digit)

    def pack(self, integers: ring.Integers) -> Integers:
        """One client's integers, in layout order, as ``slots`` signed integers."""
        updates, counters = integers[: self.values], integers[self.values :]
        stacked = np.zeros(-(-self.values // self.stack) * self.stack, np.int64)
        stacked[: self.values] = updates
        lanes = stacked.reshape(-1, self.stack)
        slots = lanes @ (np.int64(1) << (self.bits * np.arange(self.stack, dtype=np.int64)))
        if not self.digit:
            return np.concatenate([slots, counters])
        shifts = self.digit * np.arange(self.per_counter, dtype=np.int64)
        words = counters.astype(np.uint32).astype(np.int64)
        digits = (words[:, None] >> shifts & ((1 << self.digit) - 1)).reshape(-1)
        slots[: len(digits)] += digits << (self.bits * self.stack)
        return slots

    def unpack(self, slots: Integers) -> Integers:
        """The sum's integers, in layout order, from the sum's slots."""
        count = -(-self.values // self.stack)
        rest, half = slots[:count].copy(), np.int64(1) << (self.bits - 1)
        lanes = np.empty((count, self.stack), np.int64)
        for i in range(self.stack):
            low = ((rest + half) & (2 * half - 1)) - half
            lanes[:, i] = low
            rest = (rest - low) >> self.bits
        updates = lanes.reshape(-1)[: self.values]
        if not self.digit:
            return np.concatenate([updates, slots[count:]])
        shifts = self.digit * np.arange(self.per_counter, dtype=np.int64)
        digits = rest[: self.counters * self.per_counter].reshape(self.counters, -1)
        words = (digits << shifts).sum(axis=1).astype(np.uint32)
        return np.concatenate([updates, words.view(np.int32).astype(np.int64)])


@functools.lru_cache(maxsize=8)
def _packing(layout: Layout, limit: int, clients: int) -> Packing:
    updates = [field for field in layout if field.update]
    values = sum(field.size for field in updates)
    counters = sum(field.size for field in layout) - values
    bits = max((field.bits for field in updates), default=MAX_BITS)
    stack = max(1, (limit.bit_length()) // bits)
    while stack > 1 and 1 << (bits * stack - 1) > limit:
        stack -= 1
    count = -(-values // stack)
    # The stacked sums reach 2^(bits * stack - 1); digit sums have what is above them.
    room = (limit - (1 << (bits * stack - 1))) >> (bits * stack)
    digit = min(MAX_BITS, (room // clients + 1).bit_length() - 1)
    if not digit or counters * -(-MAX_BITS // digit) > count:
        return Packing(values, counters, bits, stack, 0, count + counters)
    return Packing(values, counters, bits, stack, digit, count)
