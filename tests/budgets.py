"""Clients with a ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from test_comparators import settings_of

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.ledger import Ledger
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer

NONE = PrivacySettings()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Ledger]:
    with contextlib.closing(Ledger(path)) as ledger:
        yield ledger


def client(bundled: Backbone, ledger: Ledger, method: str, dp: PrivacySettings) -> LocalLearner:
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    trainer = LocalTrainer(bundled, train, test, 0, dp=dp)
    trainer.ledger = ledger
    return trainer.prepare(settings_of(method, epochs=2, batch_size=4))
