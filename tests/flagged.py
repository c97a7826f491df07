""""""

from __future__ import annotations

import argparse

from secure_fedprompt.host import command


def flags(cls: type, words: list[str]) -> argparse.Namespace:
    parser = command.parser("x", "y", "z")
    command.add_flags(parser, cls)
    return parser.parse_args(words)
