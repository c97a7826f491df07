"""What a client has spent: steps on its images, and uploads of the client as a whole.

A line is synced to the disk *before* the steps, or the upload, that it stands for, so a client that
is killed at any point has counted too much or right, never too little. All runs in one
``state_dir`` are counted together, with and without noise: they are about the same images. What
happened is kept apart from how it is counted (``accounting``, ``client_noise``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from secure_fedprompt.clients import accounting
from secure_fedprompt.clients.accounting import Steps
from secure_fedprompt.clients.record_file import RecordFile, parse
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.errors import BudgetError

NAME = "privacy.jsonl"  # in a client's state folder
_KIND, _REMEDY = "privacy ledger", "restore it from a copy, since what it counted is spent"
_SLACK = 1 + 1e-9  # of a budget that is planned to be met


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The steps that an attempt at a round may take; ``sigma`` is 0 without noise. ``delta`` and
    ``accountant`` are how their client counts them."""

    run: str
    round: int
    sigma: float
    rate: float
    steps: int
    delta: float = 1e-5
    accountant: str = "prv"


class Upload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A contribution to a sum: what the sum tells of the client, ``rho`` under zero-concentrated
    DP. None: nothing bounds it."""

    run: str
    learning_round: int
    rho: float | None

    @property
    def cost(self) -> float:
        return math.inf if self.rho is None else self.rho


def _decode(line: bytes) -> Entry | Upload:
    try:
        record = msgspec.json.decode(line, type=dict[str, object])
        kind: type[Entry | Upload] = Upload if "rho" in record else Entry
        return msgspec.convert(record, kind)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None


class Ledger:
    """The record in one file, or in memory for simulations.

    Attributes:
        entries: of images; uploads: of the client.

    Raises:
        ConfigError: the file is not a ledger, or another process uses it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.entries, self.uploads = list[Entry](), list[Upload]()
        self._file: RecordFile[Entry | Upload] | None = None
        if path is not None:
            self._file = RecordFile(path, _KIND, _decode, _REMEDY)
            self._take(self._file.records)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """What a file says by now; it may be in use.

        Raises:
            ConfigError: it is not a ledger.
        """
        made = cls()
        lines = path.read_bytes().splitlines(keepends=True)
        made._take(parse(lines, _decode, f"{_KIND} {path}", _REMEDY)[0])
        return made

    def _take(self, records: list[Entry | Upload]) -> None:
        self.entries += [record for record in records if isinstance(record, Entry)]
        self.uploads += [record for record in records if isinstance(record, Upload)]

    def _append(self, record: Entry | Upload) -> None:
        if self._file is not None:
            self._file.append(msgspec.json.encode(record))
        self._take([record])

    # -- images ------------------------------------------------------------------------------------

    @property
    def history(self) -> list[Steps]:
        return [Steps(e.sigma, e.rate, e.steps) for e in self.entries]

    @property
    def counting(self) -> tuple[float, str]:
        """Delta and accountant with which this client counts: of its last steps with noise."""
        noisy = [(e.delta, e.accountant) for e in self.entries if e.sigma]
        return noisy[-1] if noisy else (1e-5, "prv")

    def sigma_of(self, run: str) -> float | None:
        """The noise multiplier with which a run began; 0 if it began without noise."""
        return next((e.sigma for e in self.entries if e.run == run), None)

    def check_bounded(self, settings: PrivacySettings) -> None:
        """Refuse a budget that no noise can keep.

        Raises:
            BudgetError: images were trained on without noise.
        """
        bare = sum(e.sigma == 0 for e in self.entries)
        if settings.target_epsilon and bare:
            raise BudgetError(
                f"target_epsilon = {settings.target_epsilon:g}: these images were trained on in "
                f"{bare} rounds without dp, so that epsilon is infinite; use noise_multiplier "
                "alone, which has no budget, or a new state_dir for images that are new"
            )

    def reserve(self, entry: Entry, settings: PrivacySettings) -> None:
        """Count steps before they are taken; durable on return.

        Raises:
            BudgetError: they would exceed ``target_epsilon``, with the figures.
        """
        self.check_room(Steps(entry.sigma, entry.rate, entry.steps), settings)
        self._append(entry)

    def check_room(self, steps: Steps, settings: PrivacySettings) -> None:
        """Refuse steps that the budget has no room for.

        Raises:
            BudgetError: they would exceed ``target_epsilon``, with the figures.
        """
        if not settings.target_epsilon:
            return
        needed = accounting.epsilon([*self.history, steps], settings.delta, settings.accountant)
        if needed > settings.target_epsilon:
            spent = accounting.epsilon(self.history, settings.delta, settings.accountant)
            raise BudgetError(
                f"target_epsilon = {settings.target_epsilon:g}: epsilon {spent:.3g} at delta "
                f"{settings.delta:g} is spent, this round would make it {needed:.3g}; raise "
                "it, or stop here"
            )

    # -- the client --------------------------------------------------------------------------------

    def rho(self, runs: Callable[[str], bool] = lambda run: True) -> float:
        """What the uploads of these runs tell together, under zero-concentrated DP."""
        return math.fsum(upload.cost for upload in self.uploads if runs(upload.run))

    def release(self, upload: Upload, limit: float, delta: float) -> None:
        """Count an upload before it leaves; durable on return.

        Args:
            limit: largest epsilon at ``delta`` of all uploads together; 0 is none.

        Raises:
            BudgetError: it would exceed the limit, with the figures.
        """
        spent = self.rho()
        needed = client_noise.epsilon(spent + upload.cost, delta)
        if limit and needed > limit * _SLACK:
            before = client_noise.epsilon(spent, delta)
            raise BudgetError(
                f"policy.max_client_epsilon = {limit:g}: epsilon {before:.3g} at delta {delta:g} "
                f"is spent, this upload would make it {needed:.3g}; raise it, or stop here"
            )
        self._append(upload)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
