"""Addresses as users write them: tcp://HOST:PORT, with IPv6 addresses in brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secure_fedprompt.protocol.errors import ConfigError

_FORM = re.compile(r"tcp://(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]/:\s]+):(\*|\d+)")


@dataclass(frozen=True)
class Address:
    """Attributes:
    host: without brackets; "*" is every interface.
    port: None for any that is free.
    """

    host: str
    port: int | None

    @property
    def ipv6(self) -> bool:
        return ":" in self.host

    @classmethod
    def parse(cls, key: str, text: str) -> Address:
        """An address of the setting ``key``.

        Raises:
            ConfigError: it is none.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{key} = {text!r}: write tcp://HOST:PORT, an IPv6 address in brackets"
            )
        host, port = found[1].strip("[]"), found[2]
        if port != "*" and not 0 < int(port) < 1 << 16:
            raise ConfigError(f"{key} = {text!r}: port {port} is not between 1 and 65535")
        return cls(host, None if port == "*" else int(port))
