"""Which fields of the messages are protected, by what, and how large a message should be."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from secure_fedprompt.protocol import fixedpoint, homomorphic, masking, merkle, rolls
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import Exact, Number
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.packing import Packing
from secure_fedprompt.protocol.plan import RoundPlan

TYPES = {cls.__name__: cls for cls in m.CATALOGUE.types.values()}
SEALED_PROMPT = "AES-256-SIV under the cohort key"
AEAD = "AES-256-GCM to the recipient"
KEYED = "a tag that is uniform without the clients' key"
MASKS = "pairwise and self masks"
SHARE = "a share that is uniform without the other one"
PROTECTED: dict[type, dict[str, str]] = {
    m.Shares: {"boxes": AEAD},
    m.Inbox: {"boxes": AEAD},
    m.Evidence: {"boxes": AEAD},
    m.MaskedUpload: {"vector": MASKS, "tag": MASKS},
    m.OpenedSum: {"tag": KEYED},
    m.KeyGrant: {"grants": AEAD},
    m.KeyBox: {"grant": AEAD},
    m.CipherUpload: {"ciphertexts": "homomorphic encryption", "tag": KEYED},
    m.CipherSum: {"ciphertexts": "homomorphic encryption", "tag": KEYED},
    m.SealedPrompt: {"box": SEALED_PROMPT},
    m.KeyShares: {"share": SHARE, "box": AEAD},
    m.HelperOffer: {"offer": "oblivious transfer"},
    m.HelperAnswer: {"answer": "oblivious transfer"},
    m.HelperInputs: {"boxes": AEAD},
    m.HelperChoices: {"choices": "oblivious transfer"},
    m.HelperTables: {"tables": "garbled circuit"},
    m.HelperOutcome: {"boxes": AEAD},
    m.Outcome: {"share": SHARE, "box": AEAD},
}
HEADER = 2


def protected(message: m.Message, plan: RoundPlan | None) -> dict[str, str]:
    """Fields of a message that are protected, and by what."""
    found = dict(PROTECTED.get(type(message), {}))
    sealed = plan is not None and plan.encrypted
    if isinstance(message, m.Plan) and sealed and message.plan.learning_round > 1:
        found["base"] = SEALED_PROMPT
    if isinstance(message, m.Finish) and sealed:
        found["vector"] = SEALED_PROMPT
    return found


def in_the_clear(message: m.Message, plan: RoundPlan | None) -> list[str]:
    """The other fields."""
    hidden = protected(message, plan)
    return [f.name for f in dataclasses.fields(message) if f.name not in hidden]  # type: ignore[arg-type]


def leaves(message: m.Message) -> Iterator[tuple[str, Any]]:
    """Every value in the clear, however deep, with its path: numbers, strings and bytes."""
    for name in in_the_clear(message, None):
        yield from _leaves(name, getattr(message, name))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(path, item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(f"{path}.{field.name}", getattr(value, field.name))
    else:
        yield path, value


# -- sizes -----------------------------------------------------------------------------------------

Size = Callable[[RoundPlan, str], int]


def _boxes(plan: RoundPlan) -> int:
    return m.BOX * masking.neighbourhoods(plan).boxes


def _near(plan: RoundPlan, name: str) -> tuple[str, ...]:
    graph = masking.neighbourhoods(plan)
    return graph[name] if name in plan.points else plan.cohort


def _roll(names: Iterable[str]) -> int:
    return 4 + len(rolls.pack(tuple(names)))


def _signers(names: Sequence[str], count: int) -> int:
    return 4 + sum(66 + len(n.encode()) for n in names[:count])


def _bits(names: Sequence[str]) -> int:
    return 4 + -(-len(names) // 8)


def _proof(plan: RoundPlan, near: Sequence[str]) -> int:
    """Of these neighbours' place in the tree of adverts."""
    tree = merkle.Tree([merkle.ABSENT] * len(plan.cohort))
    return 4 + 32 * len(tree.proof(map(masking.neighbourhoods(plan).place, near)))


def _advert(name: str) -> int:
    return 16 + 4 + 2 + len(name.encode()) + 32 * 4 + 1 + 64


def _ciphertexts(plan: RoundPlan, size: int) -> int:
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    slots = Packing.of(plan.layout, scheme.limit, plan.parameters.clients).slots
    return 4 + -(-slots // scheme.slots) * (4 + size)


_ROUND = 16 + 4
_SIZES: dict[type, Size] = {
    m.MaskedUpload: lambda plan, name: _ROUND + 4 + fixedpoint.wire_size(plan.layout) + 16,
    m.OpenedSum: lambda plan, name: (
        _ROUND + 4 + fixedpoint.wire_size(plan.layout) + 16 + _bits(plan.cohort)
    ),
    m.PlainUpload: lambda plan, name: _ROUND + 4 + 8 * total_size(plan.layout),
    m.Advert: lambda plan, name: _advert(name),
    m.Adverts: lambda plan, name: (
        _ROUND + 4 + sum(map(_advert, _near(plan, name))) + _proof(plan, _near(plan, name))
    ),
    m.Shares: lambda plan, name: _ROUND + 4 + _boxes(plan) + 64,
    m.Inbox: lambda plan, name: _ROUND + _bits(_near(plan, name)) + 4 + _boxes(plan),
    m.SurvivorList: lambda plan, name: _ROUND + _bits(plan.cohort),
    m.Reveal: lambda plan, name: _ROUND + 4 + 32 * len(_near(plan, name)),
    m.UnmaskRequest: lambda plan, name: _ROUND + _signers(_near(plan, name), plan.threshold),
    m.CipherUpload: lambda plan, name: (
        _ROUND + 32 + 16 + 64 + _ciphertexts(plan, homomorphic.fresh_size(plan.parameters))
    ),
    m.CipherSum: lambda plan, name: (
        _ROUND
        + _roll(plan.cohort)
        + _ciphertexts(plan, homomorphic.summed_size(plan.parameters))
        + 20
    ),
    m.SumSigned: lambda plan, name: _ROUND + _signers(plan.cohort, plan.quorum),
    m.RoundEnd: lambda plan, name: _ROUND + 2,
}


def expected_size(kind: type, plan: RoundPlan | None, client: str) -> int | None:
    """Bytes of a message to or from a client, in a round in which nobody drops out.

    Ciphertexts count with their largest size, before SEAL compresses them.

    Returns:
        None where the size depends on more than the plan.
    """
    fixed = fixed_size(kind)
    if fixed is not None:
        return HEADER + fixed
    ciphers = kind in (m.CipherUpload, m.CipherSum)
    if plan is None or kind not in _SIZES or (ciphers and not plan.encrypted):
        return None
    return HEADER + _SIZES[kind](plan, client)


def fixed_size(kind: type) -> int | None:
    """Bytes of a message whose fields all have a fixed width."""
    total = 0
    for hint in get_type_hints(kind, include_extras=True).values():
        match get_args(hint)[1] if get_origin(hint) is Annotated else None:
            case Number(form):
                total += struct.calcsize(form)
            case Exact(size):
                total += size
            case _:
                return None
    return total
