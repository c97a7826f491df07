"""Merkle trees (Merkle, CRYPTO 1987) with proofs of several leaves at once.

Leaf i of n stands for the i-th of a list that everybody knows, so that a proof shows what is there
and also what is not: ``ABSENT``. A node without a sibling moves up as it is; since n is fixed, no
two trees share a root. Neighbouring leaves share most of their path: a run of any length takes at
most two digests a level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from secure_fedprompt.protocol.errors import AdvertMismatchError
from secure_fedprompt.protocol.expand import Purpose, digest

ABSENT = digest(Purpose.MERKLE_LEAF)


def leaf(data: bytes) -> bytes:
    """Of what is there; never ``ABSENT``."""
    return digest(Purpose.MERKLE_LEAF, data)


def _node(left: bytes, right: bytes) -> bytes:
    return digest(Purpose.MERKLE_NODE, left, right)


class Tree:
    """All digests, from the leaves up."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self.levels = [list(leaves)]
        while len(below := self.levels[-1]) > 1:
            above = [_node(*below[i : i + 2]) for i in range(0, len(below) - 1, 2)]
            self.levels.append(above + below[len(above) * 2 :])

    @property
    def root(self) -> bytes:
        return self.levels[-1][0]

    def proof(self, places: Iterable[int]) -> tuple[bytes, ...]:
        """What ``fold`` needs besides these leaves."""
        known, found = set(places), list[bytes]()
        for level in self.levels[:-1]:
            wanted = sorted({i ^ 1 for i in known} - known)
            found += [level[i] for i in wanted if i < len(level)]
            known = {i >> 1 for i in known}
        return tuple(found)


def fold(count: int, leaves: Mapping[int, bytes], proof: Sequence[bytes]) -> bytes:
    """The root of ``count`` leaves, from some of them and a proof.

    Raises:
        AdvertMismatchError: the proof is longer or shorter than these leaves need.
    """
    known, rest, size = dict(leaves), iter(proof), count
    short = AdvertMismatchError(f"{len(proof)} digests do not prove {len(leaves)} leaves")
    while size > 1:
        for i in sorted({i ^ 1 for i in known} - set(known)):
            if i < size:
                if (given := next(rest, None)) is None:
                    raise short
                known[i] = given
        known = {
            i >> 1: _node(known[i], known[i + 1]) if i + 1 < size else known[i]
            for i in sorted(known) if not i & 1
        }  # fmt: skip
        size = (size + 1) // 2
    if next(rest, None) is not None or 0 not in known:
        raise short
    return known[0]
