"""Keys and layouts of homomorphic tests."""

from __future__ import annotations

import functools
import os

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.protocol.homomorphic import Scheme, choose


@functools.cache
def key(protection: str, clients: int = 100, flood: int = 8) -> CohortKey:
    return CohortKey.make(Scheme(protection, choose(protection, clients, flood)), os.urandom)
