"""DP-SGD of whole clients: budgets, ledgers, refusals, and what stays with a client."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rounds import later, make_parties, make_plan
from test_comparators import settings_of

from secure_fedprompt import narration
from secure_fedprompt.__main__ import main
from secure_fedprompt.clients.accounting import Steps, epsilon
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.dp_sgd import PrivateTraining
from secure_fedprompt.clients.features import predict
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.ledger import Entry, Ledger, Upload
from secure_fedprompt.clients.methods.base import METHODS, Batch
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.host.log import Log
from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.errors import BudgetError, ConfigError
from secure_fedprompt.protocol.layout import METRICS

SAMPLE = PrivacySettings(kind="sample", noise_multiplier=1.0)


_open: list[Ledger] = []


def open_ledger(folder: Path) -> Ledger:
    """Of a client that is started, after the last one there ended."""
    close_ledgers()
    _open.append(Ledger(folder / "privacy.jsonl"))
    return _open[-1]


@pytest.fixture(autouse=True)
def close_ledgers_in_the_end() -> Iterator[None]:
    yield
    close_ledgers()


def close_ledgers() -> None:
    while _open:
        _open.pop().close()


def private_client(bundled: Backbone, folder: Path, method: str, **dp: Any) -> LocalLearner:
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    settings = PrivacySettings(**{"kind": "sample", "noise_multiplier": 1.0, **dp})
    trainer = LocalTrainer(bundled, train, test, 0, dp=settings)
    trainer.keep = folder
    trainer.ledger = open_ledger(folder)
    return trainer.prepare(settings_of(method, epochs=2))


@pytest.mark.parametrize("method", ["promptfl", "fedotp", "fedmgp"])
def test_a_client_trains_privately_and_keeps_metrics_to_itself(
    bundled: Backbone, tmp_path: Path, method: str
) -> None:
    learner = private_client(bundled, tmp_path, method)
    plan = make_plan(3, tensors=learner.tensors(), max_weight=1, rounds=2)
    values, _ = learner.run(Work(plan, learner.initial()))  # type: ignore[misc]
    assert [float(values[k]) for k in ("seen", "correct", "loss")] == [0, 0, 0]
    assert all(np.abs(values[t.name]).max() > 0 for t in learner.tensors())
    (entry,) = Ledger.read(tmp_path / "privacy.jsonl").entries
    assert (entry.sigma, entry.rate, entry.steps) == (1.0, 0.5, 4)
    other, _ = private_client(bundled, tmp_path / "b", method).run(Work(plan, learner.initial()))  # type: ignore[misc]
    name = learner.tensors()[0].name
    assert not np.array_equal(values[name], other[name])  # the same seed, other noise


@pytest.mark.slow
def test_a_budget_lasts_for_the_run_and_then_refuses(bundled: Backbone, tmp_path: Path) -> None:
    learner = private_client(
        bundled, tmp_path, "promptfl", noise_multiplier=0.0, target_epsilon=4.0, retries=0,
        accountant="rdp",
    )  # fmt: skip
    for number in (1, 2, 3):
        plan = make_plan(
            3, tensors=learner.tensors(), round=number, learning_round=number, rounds=3
        )
        learner.run(Work(plan, learner.initial()))
    spent = epsilon(Ledger.read(tmp_path / "privacy.jsonl").history, 1e-5, "rdp")
    assert 3.8 < spent <= 4.0
    plan = make_plan(3, tensors=learner.tensors(), round=4, learning_round=3, rounds=3)
    with pytest.raises(
        BudgetError,
        match=r"target_epsilon = 4: epsilon (4|3\.[89]\d?) at delta 1e-05 is spent, this round",
    ):
        learner.run(Work(plan, learner.initial()))
    again = private_client(bundled, tmp_path, "promptfl", noise_multiplier=0.0, target_epsilon=3.5)
    new = make_plan(3, tensors=learner.tensors(), run=b"n" * 16)
    with pytest.raises(BudgetError, match="is spent already"):
        again.run(Work(new, learner.initial()))


def test_more_noise_applies_at_once_and_less_never(bundled: Backbone, tmp_path: Path) -> None:
    for number, (asked, used) in enumerate([(1.0, 1.0), (4.0, 4.0), (0.5, 1.0)], start=1):
        learner = private_client(bundled, tmp_path, "promptfl", noise_multiplier=asked)
        plan = make_plan(3, tensors=learner.tensors(), round=number, learning_round=1, rounds=9)
        learner.run(Work(plan, learner.initial()))
        assert learner.sigma == used


def test_clients_in_one_process_have_ledgers_of_their_own(
    bundled: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a state folder, as in simulations, nothing is shared and nothing is written."""
    monkeypatch.chdir(tmp_path)
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    trainers = [LocalTrainer(bundled, train, test, 0, dp=SAMPLE) for _ in range(2)]
    for trainer in trainers:
        learner = trainer.prepare(settings_of("promptfl"))
        learner.run(Work(make_plan(3, tensors=learner.tensors()), learner.initial()))
    assert [len(trainer.ledger.entries) for trainer in trainers] == [1, 1]
    assert not list(tmp_path.iterdir())


def test_the_budget_is_checked_before_any_step(
    bundled: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = private_client(bundled, tmp_path, "promptfl")
    seen: list[int] = []

    def spy(self: PrivateTraining, batch: Batch) -> None:
        seen.append(len(Ledger.read(tmp_path / "privacy.jsonl").entries))

    monkeypatch.setattr(PrivateTraining, "step", spy)
    learner.run(Work(make_plan(3, tensors=learner.tensors()), learner.initial()))
    assert seen == [1] * 4


def test_delta_must_be_below_one_over_the_number_of_images(bundled: Backbone) -> None:
    images, test = sets.generated_sets(8, ["photo"], 4, 1, 0)
    for delta, refused in ((1 / 32, True), (0.99 / 32, False)):
        dp = PrivacySettings(kind="sample", noise_multiplier=1.0, delta=delta)
        assert len(images) == 32
        if refused:  # before anybody is asked
            with pytest.raises(
                ConfigError, match=r"dp\.delta = 0\.03125: with 32 images .* below 0\.031"
            ):
                LocalTrainer(bundled, images, test, dp=dp)
        else:
            LocalTrainer(bundled, images, test, dp=dp).prepare(settings_of("promptfl"))


@pytest.mark.parametrize("epochs", [1, 1000])
def test_a_budget_that_is_gone_is_said_before_a_run_is_joined(
    bundled: Backbone, epochs: int
) -> None:
    """And one that does not last for what the server asks is not: how many epochs a client leaves
    for would tell how many images it has."""
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    settings = settings_of("promptfl", epochs=epochs, batch_size=2)
    dp = PrivacySettings(kind="sample", noise_multiplier=1.0, target_epsilon=2.0, accountant="rdp")
    client = LocalTrainer(bundled, train, test, 0, dp=dp)
    learner = client.prepare(settings)
    if epochs == 1000:
        with pytest.raises(BudgetError, match="target_epsilon = 2"):  # which nobody else is told
            learner.run(Work(make_plan(3, tensors=learner.tensors()), learner.initial()))
    client.ledger.reserve(Entry("ab", 1, 1.0, 0.25, 4000), SAMPLE)
    with pytest.raises(BudgetError, match=r"target_epsilon = 2: .* this round would make it"):
        client.prepare(settings)
    client.resuming = True  # to leave now would tell the server what is spent
    client.prepare(settings)


@pytest.mark.parametrize(
    "method",
    sorted(set(METHODS) - {"promptfl", "fedotp", "fedmgp", "coop", "fedper", "dpfpl"}),
)
def test_methods_without_losses_of_single_images_are_refused(
    bundled: Backbone, tmp_path: Path, method: str
) -> None:
    with pytest.raises(ConfigError, match=r"dp\.kind = 'sample'"):
        private_client(bundled, tmp_path, method)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for changes, says in (
        ({"kind": "sample"}, "without dp.target_epsilon and dp.noise_multiplier: set one"),
        ({"kind": "much"}, "dp.kind = 'much'"),
        ({"target_epsilon": 8.0}, "set kind = 'sample'"),
        ({"accountant": "gdp"}, "dp.accountant = 'gdp'"),
    ):
        with pytest.raises(ConfigError, match=says):
            PrivacySettings(**changes).check()  # type: ignore[arg-type]
    PrivacySettings().check()
    PrivacySettings(kind="sample", target_epsilon=1, noise_multiplier=1).check()


def test_privacy_plan_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.json"
    words = ["privacy", "plan", "--images", "400", "--epochs", "4", "--delta", "1e-4"]
    assert main([*words, "--target-epsilon", "8", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["steps"] == 500
    both = plan["epsilon_by_accountant"]
    assert 7.8 < both["prv"] <= 8 < both["rdp"]
    assert plan["epsilon"] == both[plan["accountant"]]
    capsys.readouterr()
    assert main([*words, "--noise-multiplier", "1", "--images", "5000"]) == 0
    assert "it would allow to publish" not in (shown := capsys.readouterr().out)
    assert "noise multiplier 1: epsilon" in shown
    assert main([*words, "--noise-multiplier", "1", "--images", "50000"]) == 0
    assert "it would allow to publish" in " ".join(capsys.readouterr().out.split())
    assert main(words) == 2
    assert main(["privacy", "status", str(tmp_path)]) == 2
    assert "has not trained" in capsys.readouterr().err
    ledger = open_ledger(tmp_path)
    for run in ("ab" * 16, "cd" * 16):
        ledger.reserve(Entry(run, 1, 1.5, 0.1, 40), SAMPLE)
        ledger.release(Upload(run, 1, 0.02), 0.0, 1e-5)
    status = ["privacy", "status", str(tmp_path), "--json", str(out)]
    assert main(status) == 0  # while the client runs
    shown = capsys.readouterr().out
    assert "run abababab: 1 rounds, 40 steps, noise multiplier 1.5: epsilon" in shown
    assert f"; 1 uploads, client epsilon {client_noise.epsilon(0.02, 1e-5):.4g}" in shown
    told = json.loads(out.read_text())
    assert told["epsilon"] == epsilon([Steps(1.5, 0.1, 80)], 1e-5)
    assert told["client_epsilon"] == client_noise.epsilon(0.04, 1e-5)
    ledger.reserve(Entry("ef" * 16, 1, 0.0, 0.1, 40), PrivacySettings())
    ledger.release(Upload("ef" * 16, 1, None), 0.0, 1e-5)
    assert main(status) == 0
    shown = capsys.readouterr().out
    assert "run efefefef: 1 rounds, 40 steps without dp; 1 uploads, no noise" in shown
    assert json.loads(out.read_text())["client_epsilon"] is None
    assert "one image more or less: epsilon inf" in shown
    assert "this client or zeros in its place: epsilon inf" in shown


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kind", ["none", "sample"])
def test_a_clients_own_figures_stay_with_it(
    bundled: Backbone, tmp_path: Path, kind: str, wanted: bool
) -> None:
    """Where no round counts, and under dp, they are taken and not sent."""
    noise = {"noise_multiplier": 1.0 if kind == "sample" else 0.0}
    learner = private_client(bundled, tmp_path, "promptfl", kind=kind, **noise)
    learner.client.local_metrics = wanted
    plan = make_plan(3, tensors=learner.tensors(), max_weight=1, rounds=2)
    uncounted = dataclasses.replace(
        plan, layout=tuple(f for f in plan.layout if f.name not in METRICS)
    )
    sent, _ = learner.run(Work(uncounted, learner.initial()))  # type: ignore[misc]
    assert set(sent) == {t.name for t in learner.tensors()}
    own = learner.figures
    learner.method.begin({"ctx": learner.initial().reshape(sent["ctx"].shape)}, 1)
    guesses, losses = predict(learner.method, learner.client._features["features"][1])
    labels = learner.client._sets[1].labels
    counted = (len(labels), int((guesses == labels).sum()), float(losses.mean()))
    assert (own.images, own.correct, own.loss) == (counted if wanted else (0, 0, None))
    assert (own.first_loss is None) is (kind == "sample")  # Opacus' steps do not tell
    sent, _ = learner.run(Work(later(plan), learner.initial()))  # type: ignore[misc]
    assert (float(sent["seen"]) > 0) is (kind == "none")
    assert (learner.figures.images > 0) is (wanted or kind == "none")
    told = io.StringIO()
    log = Log("client", console=Console(file=told))
    narration.sent(log, session_of(learner), Work(plan, learner.initial()), 1.0)
    assert ("of our 8 test images the global prompt got" in told.getvalue()) is bool(
        learner.figures.images
    )
    assert ("training loss" in told.getvalue()) is (kind == "none")
    assert "clipped" not in told.getvalue()
    learner.clipped = 3
    narration.sent(log, session_of(learner), Work(plan, learner.initial()), 1.0)
    assert f"warning 3 values were beyond clip = {plan.clip:g}: the update was" in told.getvalue()


def session_of(learner: LocalLearner) -> Session[LocalLearner]:
    session = Session(next(iter(make_parties(3).values())), learner.client)
    session._learner = learner
    return session
