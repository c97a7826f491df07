"""A round of DP-SGD: what is spent is on the disk before the first step."""

from __future__ import annotations

import os

import torch

from secure_fedprompt.clients.accounting import noise_for, steps_of
from secure_fedprompt.clients.dp_sgd import Draws, PrivateTraining
from secure_fedprompt.clients.drift import Drift, decay_of
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.learning import LocalLearner, named_round
from secure_fedprompt.clients.ledger import Entry
from secure_fedprompt.protocol.errors import UpdateError
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.schedule import rate


def train_privately(learner: LocalLearner, images: Features, plan: RoundPlan) -> None:
    """Train on a round's prompt with DP-SGD.

    Raises:
        BudgetError: the budget does not allow this round.
        ConfigError: this run was begun without dp.
    """
    client, method, s, run = learner.client, learner.method, learner.settings, plan.run.hex()
    dp, ledger = client.dp, client.ledger
    learner.check_kind(plan.run)
    ledger.check_bounded(dp)
    share, steps = steps_of(len(images), s.batch_size, s.epochs)
    learner.sigma = max(ledger.sigma_of(run) or 0.0, dp.noise_multiplier)
    if not learner.sigma:
        left = steps * (plan.rounds - plan.learning_round + 1 + dp.retries)
        before = ledger.history
        learner.sigma = noise_for(dp.target_epsilon, dp.delta, share, left, before, dp.accountant)
    entry = Entry(run, plan.round, learner.sigma, share, steps, dp.delta, dp.accountant)
    ledger.reserve(entry, dp)
    optimiser = torch.optim.SGD(
        method.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=decay_of(s, steps)
    )
    paces = [rate(s, plan.learning_round, plan.rounds, epoch) for epoch in range(s.epochs)]
    epochs = [done * s.epochs // steps for done in range(steps)]
    drift = Drift(s, method.parameters(), paces, epochs)
    draws = Draws(os.urandom)
    training = PrivateTraining(
        method, optimiser, draws, sigma=learner.sigma, clip=dp.max_grad_norm,
        expected=share * len(images),
    )  # fmt: skip
    try:
        for done in range(steps):
            if client.cancelled.is_set():
                raise UpdateError("training was cancelled")
            optimiser.param_groups[0]["lr"] = paces[epochs[done]]
            taken = draws.poisson(len(images), share)
            training.step(client.batch(images, taken))
            client.progress(named_round(plan.learning_round, plan.rounds), done + 1, steps)
        drift.even_out()
    finally:
        training.close()
