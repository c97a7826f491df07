"""What each protection is: one row of facts, from which everything else reads.

Only this table and the two ``start`` files, which name the machines, tell protections apart by
name. The audit keeps its own list: it must not believe this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CORRUPTION = 0.1  # share of clients that a regular graph tolerates, unless terms say otherwise


@dataclass(frozen=True)
class Protection:
    """A row.

    Attributes:
        name: as in settings, plans and policies.
        title: what it does, in words.
        hides: whether nobody can read a single client's update.
        masked: clients mask pairwise, on a graph; the server opens sums, with a threshold's help.
        encrypted: all clients share a key, the server adds ciphertexts and opens no sum; the global
            prompt is sealed to it.
        approximate: decrypted sums are flooded and rounded.
        default: what clients accept unless their policy says otherwise.
        server, client: what each learns.
        assumes: of the server; see ``standing`` for a run's own numbers.
    """

    name: str
    title: str
    hides: bool = True
    masked: bool = False
    encrypted: bool = False
    approximate: bool = False
    default: bool = False
    server: str = ""
    client: str = ""
    assumes: str = ""

    @property
    def keyed(self) -> bool:
        """Whether clients share a key that the server does not hold, and check sums with it."""
        return self.masked or self.encrypted

    def least(self, clients: int) -> int:
        """The smallest quorum: two lists of survivors must share an honest client."""
        return default_threshold(clients) if self.hides else 1

    def tolerated(
        self, regular: bool, clients: int, quorum: int, corruption: float = CORRUPTION
    ) -> int:
        """c: how many clients may collude with the server (masks) or pool what they know.

        Complete graph: ``tolerated_colluders``. Regular graph: the corruption that chose k.
        Homomorphic encryption: a sum of a quorum hides an honest client while
        another honest one is in it. Nobody without protection.
        """
        if not self.hides:
            return 0
        if self.encrypted:
            return max(0, quorum - 2)
        if regular:
            return max(0, min(math.floor(corruption * clients), quorum - 2))
        return tolerated_colluders(clients, quorum)

    def standing(self, clients: int, threshold: int, regular: bool) -> str:
        """What a run with these numbers stands on."""
        if not self.hides:
            return "the server sees every client's update"
        if self.encrypted:
            return (
                f"{self.name}: the server adds ciphertexts and learns no sum. All clients share "
                "one key: safe, against a dishonest server too, while no client colludes with "
                f"it; among themselves, {max(0, threshold - 2)} clients learn no more than sums"
            )
        if regular:
            return "masks on a k-regular graph: safe against an honest-but-curious server"
        c = tolerated_colluders(clients, threshold)
        return (
            f"masks on the complete graph: {clients} clients, t = {threshold}; safe against a "
            f"dishonest server with c = {c} colluding clients"
        )

    def seen(self, sums: int, fewest: int) -> str:
        """What the server of a run saw, in one honest sentence."""
        if not self.hides:
            return (
                "the server saw every client's update, image count and accuracy: protection "
                f'"{self.name}" is for comparison only'
            )
        if self.encrypted:
            return (
                f"the server added {sums} encrypted sums and could read neither them nor any "
                "client's update, image count, accuracy or loss; the figures above are a client's"
            )
        return (
            f"the server saw {sums} sums over at least {fewest} clients each, and could not see "
            "any client's update, image count, accuracy or loss"
        )


_CIPHER = {
    "encrypted": True,
    "server": "sizes and who takes part; not even the sum",
    "client": "the sum, and with it the global prompt and its accuracy; the key that opens every "
    "upload",
    "assumes": "a server that colludes with no client: all clients share the key",
}
PROTECTIONS: dict[str, Protection] = {
    row.name: row
    for row in (
        Protection(
            "masks",
            "pairwise masks over Z_2^b: the server learns the sum",
            masked=True,
            default=True,
            server="the sum of updates of each round, and the sum of counts of right answers",
            client="the sum of each round, counters included, and with it the global prompt",
            assumes="on the complete graph nothing of the server, and at most c colluding clients; "
            "on a regular one that it is honest but curious; that the sum is right, as long as no "
            "client colludes",
        ),
        Protection(
            "bfv",
            "BFV homomorphic encryption of exact integers: the server learns no sum",
            **_CIPHER,  # type: ignore[arg-type]
        ),
        Protection(
            "ckks",
            "CKKS homomorphic encryption, flooded and rounded back to exact integers",
            approximate=True,
            **_CIPHER,  # type: ignore[arg-type]
        ),
        Protection(
            "none",
            "no protection: the server sees every update",
            hides=False,
            server="every update, count and metric",
            client="the global prompt",
        ),
    )
}


def default_threshold(clients: int) -> int:
    """t = floor(2n/3) + 1; see ``tolerated_colluders`` for what that buys."""
    return 2 * clients // 3 + 1


def tolerated_colluders(clients: int, threshold: int) -> int:
    """c = min(2t - n - 1, t - 2), how many clients may collude with an active server.

    Two survivor lists with t signatures each need 2t - n or more dishonest clients, and a sum of t
    updates hides an honest one only while another honest one is in it.
    """
    return max(0, min(2 * threshold - clients - 1, threshold - 2))


_UNKNOWN = Protection("unknown", "none of ours")  # promises most, and can do nothing


def facts_of(name: str) -> Protection:
    """The row of a name that a peer may have made up: who checks it refuses it by name."""
    return PROTECTIONS.get(name, _UNKNOWN)
