"""One process at a time for what is kept on disk."""

from __future__ import annotations

from secure_fedprompt.protocol.errors import ConfigError


def lock(descriptor: int, in_use: str) -> None:
    """Hold an open file or folder until it is closed; where the system has such locks.

    Raises:
        ConfigError: another process holds it; ``in_use`` is what the user reads.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(in_use) from None
