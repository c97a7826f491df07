"""What crosses Flower between ``SecureGrid`` and ``secure``: frames, in a record of bytes."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from secure_fedprompt.protocol.codec import MAX_FRAME
from secure_fedprompt.protocol.errors import FieldError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import Identity, verify

RECORD = "secure-fedprompt"
VERSION = 1
MAX_FRAMES = 64
ENROL, OPEN, GO = "enrol", "open", "go"  # what a server asks of a node


def record(**fields: Any) -> RecordDict:
    """The content of a message with these fields."""
    return RecordDict({RECORD: ConfigRecord({"version": VERSION, **fields})})


def fields_of(message: Message) -> ConfigRecord | None:
    """The fields of a message, or None if it has none.

    Raises:
        FieldError: of another version.
    """
    found = message.content.config_records.get(RECORD)
    if found is not None and found.get("version") != VERSION:
        raise FieldError(
            f"record of version {found.get('version')!r}, ours is {VERSION}: install the same "
            "release of secure-fedprompt on server and clients"
        )
    return found


def blob(fields: ConfigRecord, name: str) -> bytes:
    """A field of bytes.

    Raises:
        FieldError
    """
    value = fields.get(name)
    if not isinstance(value, bytes) or len(value) > MAX_FRAME:
        raise FieldError(f"record's {name} is not bytes, or too long")
    return value


def blobs(fields: ConfigRecord, name: str, most: int = MAX_FRAMES) -> list[bytes]:
    """A field of several bytes.

    Raises:
        FieldError
    """
    values = fields.get(name, [])
    if not isinstance(values, list) or len(values) > most:
        raise FieldError(f"record's {name} is not a list of {most} at most")
    if not all(isinstance(v, bytes) and len(v) <= MAX_FRAME for v in values):
        raise FieldError(f"record's {name} holds what is not bytes, or too long")
    return values


def _body(challenge: bytes, node: int, roster: bytes) -> bytes:
    return digest(Purpose.NODE, challenge, node.to_bytes(8, "little"), roster)


def bind(identity: Identity, challenge: bytes, node: int, roster: bytes) -> bytes:
    """A member's signature on the node that speaks for it, to the server of its roster."""
    return identity.sign(Purpose.NODE, _body(challenge, node, roster))


def check_bound(
    public: bytes, challenge: bytes, node: int, roster: bytes, signature: bytes, who: str
) -> None:
    """Raises SignatureError if a member did not sign that this node speaks for it."""
    verify(public, Purpose.NODE, _body(challenge, node, roster), signature, who)
