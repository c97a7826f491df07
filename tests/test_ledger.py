"""What a client has spent: on disk before it is spent, in one place, and never more than allowed."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from budgets import NONE, client, opened
from rounds import make_plan

from secure_fedprompt.clients.accounting import epsilon
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.kept import Kept
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.ledger import Entry, Ledger, Upload
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol.errors import BudgetError, ConfigError

FREE = PrivacySettings(kind="sample", noise_multiplier=1.0)


def test_the_ledger_reserves_before_and_refuses_a_spent_budget(tmp_path: Path) -> None:
    path, settings = tmp_path / "s" / "x.jsonl", PrivacySettings(kind="sample", target_epsilon=2.0)
    entry, many = Entry("ab", 1, 3.0, 0.2, 20), Entry("ab", 2, 3.0, 0.2, 2000)
    with opened(path) as ledger:
        ledger.reserve(entry, settings)
        assert Ledger.read(path).entries == [entry]
        with pytest.raises(BudgetError, match=r"epsilon 1\.\d+ at delta 1e-05 is spent, this roun"):
            ledger.reserve(many, settings)
        assert Ledger.read(path).entries == [entry]  # nothing is counted for what was refused
        assert ledger.sigma_of("ab") == 3.0
        assert ledger.sigma_of("cd") is None


def test_a_given_noise_can_have_a_budget(tmp_path: Path) -> None:
    both = PrivacySettings(kind="sample", noise_multiplier=3.0, target_epsilon=2.0)
    ledger = Ledger()
    ledger.reserve(Entry("ab", 1, 3.0, 0.2, 20), both)
    with pytest.raises(BudgetError, match="target_epsilon = 2"):
        ledger.reserve(Entry("ab", 2, 3.0, 0.2, 2000), both)


def test_a_cut_line_is_dropped_and_any_other_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    with opened(path) as ledger:
        ledger.reserve(Entry("ab", 1, 1.0, 0.5, 3), FREE)
        ledger.release(Upload("ab", 1, None), 0.0, 1e-5)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # killed while it was written
    assert not Ledger.read(path).uploads
    with opened(path) as cut:
        assert len(cut.entries) == 1
        assert not cut.uploads
        cut.reserve(Entry("ab", 3, 1.0, 0.5, 3), FREE)
    assert [e.round for e in Ledger.read(path).entries] == [1, 3]  # and it can be read again
    for bad in (b"{}\n", b"[]\n", b'{"rho": "x", "run": "", "learning_round": 1}\n', b"\xff\n"):
        path.write_bytes(bad + whole)
        for read in (Ledger, Ledger.read):
            with pytest.raises(ConfigError, match="line 1 is damaged: restore it from a copy"):
                read(path)


def test_a_lost_last_newline_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    with opened(path) as ledger:
        ledger.reserve(Entry("ab", 1, 1.0, 0.5, 3), FREE)
    path.write_bytes(path.read_bytes()[:-1])
    assert len(Ledger.read(path).entries) == 1
    with opened(path) as ledger:
        ledger.reserve(Entry("ab", 2, 1.0, 0.5, 3), FREE)
    assert [e.round for e in Ledger.read(path).entries] == [1, 2]


def test_a_ledger_is_for_its_owner_and_for_one_process(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    path.touch()
    path.chmod(0o644)  # as an earlier release left it
    with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        words = [sys.executable, "-c", f"{_OPENS}\nLedger(Path({str(path)!r}))"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "is in use by another client process" in done.stderr
        Ledger.read(path)
    with opened(path):
        pass


_OPENS = "from pathlib import Path\nfrom secure_fedprompt.clients.ledger import Ledger"


KILLED = """
import os, sys
from pathlib import Path
from secure_fedprompt.clients.ledger import Entry, Ledger
from secure_fedprompt.clients.settings import PrivacySettings
ledger = Ledger(Path(sys.argv[1]))
for number in range(1, 100):
    ledger.reserve(Entry("ab", number, 0.0, 0.5, 3), PrivacySettings())
    print(number, flush=True)  # stands for the steps
    if number == 7:
        os.kill(os.getpid(), 9)
"""


def test_a_killed_client_has_counted_all_that_it_did(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    words = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -9
    assert len(Ledger.read(path).entries) == len(done.stdout.split()) == 7


def test_a_full_disk_spends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "privacy.jsonl"
    with opened(path) as ledger:
        ledger.reserve(Entry("ab", 1, 1.0, 0.5, 3), FREE)
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(ConfigError, match="privacy ledger cannot be written .*: free the"):
                ledger.reserve(Entry("ab", 2, 1.0, 0.5, 3), FREE)
        assert path.read_bytes() == before
        assert len(ledger.entries) == 1
        ledger.reserve(Entry("ab", 3, 1.0, 0.5, 3), FREE)
    assert [e.round for e in Ledger.read(path).entries] == [1, 3]


def one_round(learner: LocalLearner, number: int, run: bytes = bytes(16)) -> Any:
    plan = make_plan(3, tensors=learner.tensors(), max_weight=1, round=number, rounds=9, run=run)
    return learner.run(Work(plan, learner.initial()))


def test_rounds_without_dp_count_as_infinite(bundled: Backbone) -> None:
    ledger = Ledger()
    one_round(client(bundled, ledger, "promptfl", NONE), 1)
    assert ledger.entries == [Entry("00" * 16, 1, 0.0, 0.25, 8)]
    assert epsilon(ledger.history, 1e-5) == math.inf
    limited = PrivacySettings(kind="sample", target_epsilon=8.0)
    with pytest.raises(BudgetError, match="in 1 rounds without dp, so that epsilon is infinite"):
        ledger.check_bounded(limited)  # as the client does before it joins
    with pytest.raises(BudgetError, match="without dp"):
        one_round(client(bundled, ledger, "promptfl", limited), 2, b"n" * 16)
    one_round(client(bundled, ledger, "promptfl", FREE), 3, b"m" * 16)  # no budget, no promise
    assert [e.sigma for e in ledger.entries] == [0.0, 1.0]


@pytest.mark.parametrize("method", ["promptfl", "fedmgp"])
def test_no_run_changes_between_dp_and_none(bundled: Backbone, method: str) -> None:
    """PromptFL keeps nothing private, FedMGP does."""
    for first, then, says in (
        (NONE, FREE, "dp.kind = 'sample': .* without dp"),
        (FREE, NONE, "dp.kind = 'none': .* with DP-SGD"),
    ):
        ledger = Ledger()
        one_round(client(bundled, ledger, method, first), 1)
        with pytest.raises(ConfigError, match=says):
            one_round(client(bundled, ledger, method, then), 2)
        assert len(ledger.entries) == 1
        one_round(client(bundled, ledger, method, then), 2, b"n" * 16)  # the next run may
        one_round(client(bundled, ledger, method, first), 3)


def test_a_private_file_without_its_ledger_counts_as_one_without_dp(
    bundled: Backbone, tmp_path: Path
) -> None:
    learner = client(bundled, Ledger(), "fedmgp", NONE)
    learner.kept = Kept(tmp_path)
    one_round(learner, 1)
    again = client(bundled, Ledger(), "fedmgp", FREE)
    again.kept = Kept(tmp_path)
    with pytest.raises(ConfigError, match="without dp"):
        one_round(again, 2)


def test_training_without_dp_is_on_record_before_its_first_step(
    bundled: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, seen = client(bundled, Ledger(), "promptfl", NONE), list[int]()
    loss = learner.method.loss

    def spy(batch: Any) -> Any:
        seen.append(len(learner.client.ledger.entries))
        return loss(batch)

    monkeypatch.setattr(learner.method, "loss", spy)
    one_round(learner, 1)
    assert seen == [1] * 8
