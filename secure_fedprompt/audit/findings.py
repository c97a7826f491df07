"""What an audit says: findings with a level, a place and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """FAIL: a promise is broken, or the record is. OPEN: the record has no end, by which nobody can
    tell whether it was cut. WARN: look at it. NOTE: good to know."""

    FAIL = "fail"
    OPEN = "open"
    WARN = "warn"
    NOTE = "note"


CHECKS = {
    "chain": "records follow each other as their chain says",
    "frames": "kept frames are the ones recorded, and decode",
    "heads": "signed heads agree with the logs that they are of",
    "cross-check": "what one end says it sent is what the other says it received",
    "catalogue": "every frame is a message of the catalogue",
    "plans": "everybody was sent the same plan, and rounds followed it",
    "terms": "every plan follows from the signed terms, and one sum was opened for each prompt",
    "protection": "what the plan protects was sent under its protection",
    "keys": "no key material beside the messages that carry it sealed",
    "uniformity": "protected payloads look uniform (finds accidents, proves no secrecy)",
    "private values": "values that only the client knows are nowhere in the clear",
}


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        check: key of ``CHECKS``; where: log, and record or round, as far as known.
    """

    level: Level
    check: str
    where: str
    text: str


def failed(check: str, where: str, text: str) -> Finding:
    return Finding(Level.FAIL, check, where, text)


def warned(check: str, where: str, text: str) -> Finding:
    return Finding(Level.WARN, check, where, text)


def unfinished(check: str, where: str, text: str) -> Finding:
    return Finding(Level.OPEN, check, where, text)


def collapsed(findings: Sequence[Finding]) -> list[Finding]:
    """What is said of many places in the same words is said once, with the first of them."""
    places: dict[tuple[Level, str, str], list[str]] = {}
    for finding in findings:
        places.setdefault((finding.level, finding.check, finding.text), []).append(finding.where)
    return [
        Finding(level, check, where[0], text + (f" (and {len(where) - 1} more)" * (len(where) > 1)))
        for (level, check, text), where in places.items()
    ]


def noted(check: str, where: str, text: str) -> Finding:
    return Finding(Level.NOTE, check, where, text)
