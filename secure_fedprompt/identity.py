"""Who a program is: its key, the roster, its own entry and the server's."""

from __future__ import annotations

from secure_fedprompt.protocol import command
from secure_fedprompt.protocol.errors import RosterError
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.roster import Roster


def whoami(key: str, roster_file: str, role: str) -> tuple[Identity, Roster, Member, Member]:
    """Own key, roster, own entry and the server's.

    Raises:
        KeyFileError, RosterError
    """
    identity = command.read_identity(key)
    roster = command.read_roster(roster_file)
    me = command.member_of(identity, roster, (role,))
    servers = roster.with_role("server")
    if len(servers) != 1:
        raise RosterError(f"roster {roster_file} names {len(servers)} servers, must be one")
    return identity, roster, me, servers[0]
