"""Methods of other packages, found by their entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.methods import METHODS, MethodFacts

GROUP = "secure_fedprompt.methods"


def find(name: str) -> None:
    """Take the method of this name into the table, if an installed package has one.

    Raises:
        ConfigError: what the package declares is no method of that name.
    """
    if name in METHODS:
        return
    for point in entry_points(group=GROUP, name=name):
        try:
            facts = point.load()
        except Exception as error:
            raise ConfigError(
                f"method = {name!r}: {point.value} cannot be imported: {error}"
            ) from None
        if not isinstance(facts, MethodFacts) or facts.name != name:
            raise ConfigError(
                f"method = {name!r}: {point.value} must be a MethodFacts of that name"
            )
        METHODS[name] = facts
        return
