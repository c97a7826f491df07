"""The records of an audit log as strict types: whatever else a line holds is a fault."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from secure_fedprompt.host.recorder import FORMAT
from secure_fedprompt.protocol.codec import MAX_FRAME
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.keys import NAME

Number = Annotated[int, Meta(ge=0, lt=1 << 48)]
Place = Annotated[int, Meta(ge=0, lt=1 << 48)]
Round = Annotated[int, Meta(ge=0, lt=1 << 32)]
Size = Annotated[int, Meta(ge=0, le=MAX_FRAME)]
Time = Annotated[float, Meta(ge=0, lt=1e11)]
Name = Annotated[str, Meta(pattern=f"^{NAME.pattern}$")]
Word = Annotated[str, Meta(pattern="^[A-Za-z]{1,48}$")]
Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Run = Annotated[str, Meta(pattern="^([0-9a-f]{32})?$")]
Hex = Annotated[str, Meta(pattern="^[0-9a-f]*$")]
Way = Annotated[str, Meta(pattern="^(in|out)$")]


class _Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    n: Number
    at: Time


class Party(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    role: Word
    identity: Hash


class Open(_Base, frozen=True, tag="open", kw_only=True):
    format: str
    name: Name
    role: Word
    mode: Word
    roster: list[Party]
    cut: Number


class Segment(_Base, frozen=True, tag="segment", kw_only=True):
    format: str
    name: Name
    role: Word
    mode: Word
    roster: list[Party]
    segment: Number
    previous: Hash


class Frame(_Base, frozen=True, tag="frame", kw_only=True):
    way: Way
    peer: Name
    type: Word
    run: Run
    round: Round
    size: Size
    digest: Hash
    offset: Place | None = None


class Plan(_Base, frozen=True, tag="plan", kw_only=True):
    plan: Hex


class Terms(_Base, frozen=True, tag="terms", kw_only=True):
    terms: Hex


class Dropped(_Base, frozen=True, tag="dropped", kw_only=True):
    segment: Number


class Close(_Base, frozen=True, tag="close", kw_only=True):
    pass


Record = Open | Segment | Frame | Plan | Terms | Dropped | Close
_DECODER = msgspec.json.Decoder(Record)


def parse(text: bytes) -> Record | None:
    """A record, or None if it is none of this format.

    Raises:
        ConfigError: it opens a log of another format.
    """
    try:
        record: Record = _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    if isinstance(record, Open | Segment) and record.format != FORMAT:
        raise ConfigError(
            f"the audit log is of format {record.format[:64]!a}; this release reads {FORMAT!r}: "
            "audit it with the release that wrote it"
        )
    return record
