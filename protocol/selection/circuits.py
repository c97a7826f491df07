"""The functions that server and helper evaluate, as circuits.

Keys are additively shared: the garbler and the evaluator each hold a word, and a key is their sum
modulo 2^width, unsigned. Equal keys are ordered by position, the first one counts as larger, which
is what a stable sort does.
"""

from __future__ import annotations

import functools

from secure_fedprompt.protocol.errors import PlanError
from secure_fedprompt.protocol.selection.builder import FALSE, TRUE, Builder, Circuit, Wire, Word

WIDTH = 32


def _keys(builder: Builder, count: int, width: int) -> list[Word]:
    ours, theirs = builder.inputs()
    parts = [slice(i * width, (i + 1) * width) for i in range(count)]
    return [builder.add(ours[part], theirs[part]) for part in parts]


@functools.lru_cache(maxsize=8)
def compare(width: int = WIDTH) -> Circuit:
    """Whether the garbler's word is larger than the evaluator's. One output."""
    builder = Builder(width, width)
    ours, theirs = builder.inputs()
    return builder.circuit("compare", [builder.greater(ours, theirs)])


@functools.lru_cache(maxsize=8)
def argmax(count: int, width: int = WIDTH) -> Circuit:
    """Position of the largest of ``count`` shared keys, one-hot, by a knock-out tournament."""
    _check(count, 1)
    builder = Builder(count * width, count * width)
    keys = _keys(builder, count, width)
    players = [(key, [TRUE if j == i else FALSE for j in range(count)])
               for i, key in enumerate(keys)]  # fmt: skip
    while len(players) > 1:
        winners = []
        for (x, at_x), (y, at_y) in zip(players[::2], players[1::2], strict=False):
            first = builder.greater(x, y, or_equal=True)
            winners.append((builder.choose(first, x, y), builder.choose(first, at_x, at_y)))
        players = winners + players[len(winners) * 2 :]
    return builder.circuit(f"argmax of {count}", players[0][1])


@functools.lru_cache(maxsize=8)
def top_s(count: int, chosen: int, width: int = WIDTH) -> Circuit:
    """The ``chosen`` largest of ``count`` shared keys, in order.

    Every pair is compared once; a key's rank is how many beat it. Output k * count + i says whether
    key i is the k-th largest.

    Raises:
        PlanError: more are to be chosen than there are.
    """
    _check(count, chosen)
    builder = Builder(count * width, count * width)
    keys = _keys(builder, count, width)
    beaten: list[list[Wire]] = [[] for _ in keys]  # by key: who beats it
    for i in range(count):
        for j in range(i):
            earlier = builder.greater(keys[j], keys[i], or_equal=True)
            beaten[i].append(earlier)
            beaten[j].append(builder.lnot(earlier))
    ranks = [builder.count(wires) for wires in beaten]
    outputs = [builder.equals(rank, k) for k in range(chosen) for rank in ranks]
    return builder.circuit(f"top {chosen} of {count}", outputs)


@functools.lru_cache(maxsize=8)
def largest_k(count: int, chosen: int, width: int = WIDTH) -> Circuit:
    """Which of ``count`` shared keys are among the ``chosen`` largest; one output for each key.

    Raises:
        PlanError: more are to be chosen than there are.
    """
    _check(count, chosen)
    builder = Builder(count * width, count * width)
    return builder.circuit(f"largest {chosen} of {count}", _largest(builder, count, chosen, width))


@functools.lru_cache(maxsize=8)
def fill_slots(
    owners: int, groups: int, chosen: int, slots: int, fillers: int, width: int = WIDTH
) -> Circuit:
    """Which slots each owner fills, if it fills one for each of its keys among the ``chosen``
    largest of all. A slot that fewer than ``fillers`` owners would fill stays closed to everybody.

    Keys are in the order of their owners. Output o * slots + k says whether owner o fills slot k;
    an owner that fills slot k also fills those before it.

    Raises:
        PlanError: more are to be chosen than there are.
    """
    count = owners * groups
    _check(count, chosen)
    builder = Builder(count * width, count * width)
    best = _largest(builder, count, chosen, width)
    high = groups.bit_length()
    fills: list[list[Wire]] = []
    for o in range(owners):  # more than k of its keys: count + 2^high - 1 - k reaches 2^high
        own = best[o * groups : (o + 1) * groups]
        words = [builder.count(own, start=(1 << high) - 1 - k) for k in range(slots)]
        fills.append([word[high] if len(word) > high else FALSE for word in words])
    outputs = []
    bound = 1 << max(owners, fillers).bit_length()
    for k in range(slots):
        tally = builder.count([own[k] for own in fills], start=bound - fillers)
        enough = tally[bound.bit_length() - 1] if len(tally) >= bound.bit_length() else FALSE
        outputs.append([builder.land(own[k], enough) for own in fills])
    name = f"slots of the largest {chosen} of {owners} x {groups}"
    return builder.circuit(name, [outputs[k][o] for o in range(owners) for k in range(slots)])


def _largest(builder: Builder, count: int, chosen: int, width: int) -> list[Wire]:
    """The bits of the smallest chosen key are found from the top: a bit is set if at least
    ``chosen`` keys reach the value that has it set. Positions, as further low bits, make all keys
    different."""
    extra = (count - 1).bit_length()
    position = [
        [TRUE if (count - 1 - i) >> b & 1 else FALSE for b in range(extra)] for i in range(count)
    ]
    keys = [low + key for low, key in zip(position, _keys(builder, count, width), strict=True)]
    above: list[Wire] = [FALSE] * count  # larger than the threshold, by the bits so far
    level: list[Wire] = [TRUE] * count  # equal to it
    full = 1 << count.bit_length()  # more than any count
    for bit in reversed(range(width + extra)):
        reach = [builder.land(e, key[bit]) for e, key in zip(level, keys, strict=True)]
        tally = builder.count([builder.xor(g, r) for g, r in zip(above, reach, strict=True)],
                              start=full - chosen)  # fmt: skip
        enough = tally[full.bit_length() - 1]  # tally >= full
        below = builder.lnot(enough)
        above = [builder.xor(g, builder.land(below, r)) for g, r in zip(above, reach, strict=True)]
        level = [  # enough ? reach : level without reach
            builder.xor(builder.xor(e, r), builder.land(enough, e))
            for e, r in zip(level, reach, strict=True)
        ]
    return [builder.xor(g, e) for g, e in zip(above, level, strict=True)]


def _check(count: int, chosen: int) -> None:
    if not 1 <= chosen <= count:
        raise PlanError(f"{chosen} to be chosen of {count} keys")
