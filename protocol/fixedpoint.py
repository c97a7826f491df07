"""Fixed-point encoding of an upload vector, with a proof that no sum leaves the ring.

A value v of a field with scale 2^f becomes ``floor(v * 2^f + r)`` with r uniform in [0, 1)
(stochastic rounding, unbiased), drawn from a keyed stream. Update values are clipped to
[-clip, clip] first and multiplied by the client's weight; counters must lie within their bound.

Overflow proof. One client contributes at most ``m = ceil(bound * 2^f)`` in magnitude: rounding
moves v * 2^f to a neighbouring integer, never past the next one. A sum of n clients is at most
n * m. It is read back as a signed residue, which is exact as long as n * m <= 2^(b-1) - 1.
``check_fits`` tests just this inequality, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol.errors import FieldError, OverflowPlanError, UpdateError
from secure_fedprompt.protocol.expand import keystream
from secure_fedprompt.protocol.layout import Field, Layout, TensorSpec, Values, Vector
from secure_fedprompt.protocol.ring import (
    MAX_BITS,
    MIN_BITS,
    Integers,
    Words,
    pack,
    packed_size,
    signed,
    unpack,
)

MAX_FRAC = 24
LOSS_CLIP = 20.0
_CHUNK = 1 << 14  # values encoded at a time, to stay in the cache
FINE_STEPS = 1 << 17  # of a clip range, where the ring is chosen for it: finer than float16
MIN_UPDATE_STEPS = 128  # a clip range coarser than +-128 steps is refused


def magnitude(bound: float, frac: int) -> int:
    """Largest integer that a value within ``bound`` can become at scale 2^frac."""
    return math.ceil(math.ldexp(bound, frac))


def check_fits(field: Field, clients: int) -> None:
    """Refuse a field whose sum over ``clients`` could leave its ring.

    Raises:
        OverflowPlanError: with the numbers.
    """
    if not MIN_BITS <= field.bits <= MAX_BITS:
        raise OverflowPlanError(f"field {field.name!r}: ring of {field.bits} bits, must be 8 to 32")
    if field.frac > MAX_FRAC or not 0 < field.bound < 2**32:
        raise OverflowPlanError(f"field {field.name!r}: bound {field.bound:g} at 2^{field.frac}")
    largest, limit = clients * magnitude(field.bound, field.frac), (1 << (field.bits - 1)) - 1
    if largest > limit:
        raise OverflowPlanError(
            f"field {field.name!r}: {clients} clients x {magnitude(field.bound, field.frac)} = "
            f"{largest} can exceed {limit} in a {field.bits}-bit ring"
        )


def _sized(
    name: str, shape: tuple[int, ...], bound: float, bits: int, n: int, update: bool
) -> Field:
    limit = (1 << (bits - 1)) - 1
    for frac in range(MAX_FRAC, -1, -1):
        if n * magnitude(bound, frac) <= limit:
            return Field(name, shape, bound, bits, frac, int(update))
    raise OverflowPlanError(
        f"field {name!r}: {n} clients with values up to {bound:g} do not fit a {bits}-bit ring: "
        "use more ring bits, a smaller clip or a smaller max_weight"
    )


def smallest_ring(clients: int, *, clip: float, max_weight: int, noise: float = 0.0) -> int:
    """The fewest bits of update fields that leave ``FINE_STEPS`` on either side of zero, or all.

    Args:
        clients, clip, max_weight, noise: as in ``size_layout``.
    """
    frac = min(MAX_FRAC, math.ceil(math.log2(FINE_STEPS / clip)))
    largest = clients * magnitude(max_weight * clip + noise, frac)
    return max(MIN_BITS, min(MAX_BITS, largest.bit_length() + 1))


def size_layout(
    tensors: Sequence[TensorSpec],
    clients: int,
    *,
    clip: float,
    max_weight: int,
    max_seen: int,
    ring_bits: int,
    metrics: bool,
    filled: int = 0,
    noise: float = 0.0,
) -> Layout:
    """Choose widths and the finest safe scale of every field.

    Args:
        tensors: what the method uploads.
        clients: size of the cohort.
        clip: C, largest magnitude of an update value.
        max_weight: W_max, largest weight n_k of a client; 1 for uniform weights.
        max_seen: largest number of images that a client counts in its metrics.
        ring_bits: width b of the update fields. Counters always use 32 bits.
        metrics: whether metric counters travel at all.
        noise: room that a client's noise needs beyond clip x max_weight.
        filled: slots of every tensor, if clients say which of them they fill; else 0.

    Raises:
        OverflowPlanError: no scale fits, or it would be coarser than clip / 128.
    """
    values = sum(tensor.size for tensor in tensors)
    bound = max_weight * clip + noise
    fields = [_sized(t.name, t.shape, bound, ring_bits, clients, True) for t in tensors]
    for field in fields:
        if math.ldexp(clip, field.frac) < MIN_UPDATE_STEPS:
            raise OverflowPlanError(
                f"field {field.name!r}: a {ring_bits}-bit ring leaves only "
                f"{math.ldexp(clip, field.frac):g} steps for clip {clip:g} with {clients} clients "
                f"of weight up to {max_weight}: use more ring bits or a smaller max_weight"
            )
    counters = {lay.WEIGHT: float(max_weight), lay.CONTRIBUTORS: 1.0}
    if metrics:
        counters |= {lay.CORRECT: max_seen, lay.SEEN: max_seen, lay.ZERO_SHOT: max_seen}
        counters |= {lay.LOSS: LOSS_CLIP * max_seen}
        counters |= {lay.CLIPPED: values} if values else {}
    for name, bound in counters.items():
        field = _sized(name, (), bound, 32, clients, False)
        whole = name != lay.LOSS
        fields.append(Field(name, (), bound, 32, 0 if whole else min(field.frac, 16), 0))
    if filled:
        fields += [Field(lay.FILLED + t.name, (filled,), 1.0, 32, 0, 0) for t in tensors]
    return tuple(fields)


def weighted(layout: Layout, values: Values, *, weight: float, clip: float) -> Vector:
    """Bound and weight a contribution: the float64 vector that ``encode`` rounds.

    An update with values beyond the clip is scaled down as a whole. Values that were cut off one
    by one would be known, and a sum in which all but one client's are is that client's.

    Args:
        layout: of the plan.
        values: update tensors (unweighted) and counters, by field name. The number of values
            beyond the clip is filled in if the layout has a field for it; right answers of
            zero-shot are 0 unless they are given.
        weight: n_k, the multiplier of the update fields; at most the weight field's bound counts.
        clip: C.

    Counters beyond their bound are saturated, silently: a refusal would tell the server, which
    sets the bounds, on which side of them a private count lies.

    Raises:
        UpdateError: NaN or infinity, or a wrong shape.
    """
    weight = min(weight, next(field.bound for field in layout if field.name == lay.WEIGHT))
    filled = [f.name for f in layout if f.name in (lay.CLIPPED, lay.ZERO_SHOT)]
    vector = lay.flatten(layout, {**dict.fromkeys(filled, np.float64(0)), **values})
    if not np.isfinite(vector).all():
        at = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise UpdateError(f"update value {at} is {vector[at]}: lower the learning rate")
    sizes = [np.abs(vector[place]) for field, place in lay.slices(layout) if field.update]
    clipped = sum(int(np.count_nonzero(part > clip)) for part in sizes)
    scale = min(1.0, clip / max([part.max(initial=0.0) for part in sizes] + [clip]))
    for field, place in lay.slices(layout):
        part = vector[place]
        if field.update:
            part *= scale
            np.clip(part, -clip, clip, out=part)  # by an error of rounding
            part *= weight
        elif field.name == lay.CLIPPED:
            part[:] = clipped
        np.clip(part, -field.bound, field.bound, out=part)
    return vector


def encode(layout: Layout, vector: Vector, rounding_key: bytes) -> Words:
    """Scale and round a ``weighted`` vector into ring words.

    Args:
        layout: of the plan.
        vector: from ``weighted``.
        rounding_key: 32 secret bytes for the rounding stream, fresh for each upload.
    """
    # 20 bits, centred: |value| < 2^31 keeps the addition exact, so that it never carries a value
    # past its bound.
    draws = np.frombuffer(keystream(rounding_key, 4 * len(vector)), "<u4")
    words = np.empty(len(vector), np.uint32)
    for field, place in lay.slices(layout):
        for at in range(place.start, place.stop, _CHUNK):
            here = slice(at, min(at + _CHUNK, place.stop))
            scaled = vector[here] * 2.0**field.frac
            scaled += (draws[here] >> np.uint32(12)) * 2.0**-20 + 2.0**-21
            words[here] = np.floor(scaled, out=scaled).astype(np.int32).view(np.uint32)
    return words


def to_wire(layout: Layout, words: Words) -> bytes:
    """Ring words packed field by field at each field's width."""
    return b"".join(pack(words[part], field.bits) for field, part in lay.slices(layout))


def from_wire(layout: Layout, data: bytes | memoryview) -> Iterator[tuple[Field, slice, Words]]:
    """Each field with its place in the vector and its words, as ``to_wire`` packed them."""
    view, byte = memoryview(data), 0
    for field, place in lay.slices(layout):
        size = packed_size(field.size, field.bits)
        yield field, place, unpack(view[byte : byte + size], field.size, field.bits)
        byte += size


def wire_size(layout: Layout) -> int:
    return sum(packed_size(field.size, field.bits) for field in layout)


def add_wire(layout: Layout, data: bytes | memoryview, total: Words) -> None:
    """Add a packed vector to ``total`` in place, all of it or nothing.

    Raises:
        FieldError: wrong length, or bits set behind a field's last value.
    """
    if len(data) != wire_size(layout):
        raise FieldError(f"upload of {len(data)} bytes, the layout has {wire_size(layout)}")
    for _, place, words in list(from_wire(layout, data)):
        total[place] += words


def to_integers(layout: Layout, words: Words) -> NDArray[np.int32]:
    """Each field's residues as signed integers."""
    integers = np.empty(len(words), np.int32)
    for field, part in lay.slices(layout):
        integers[part] = signed(words[part], field.bits)
    return integers


def decode(layout: Layout, integers: Integers) -> Vector:
    """A sum of encoded contributions as float64, at natural scale. Exact."""
    values = integers.astype(np.float64)
    for field, place in lay.slices(layout):
        values[place] *= 2.0**-field.frac
    return values
