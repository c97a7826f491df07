"""What a client tells its own operator about a run, and nobody else."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.plan import RoundPlan

if TYPE_CHECKING:
    from secure_fedprompt.clients.learning import Figures, LocalLearner
    from secure_fedprompt.clients.session import Session
    from secure_fedprompt.clients.work import Work
    from secure_fedprompt.host.log import Log
    from secure_fedprompt.protocol.terms import RunTerms


def terms(log: Log, agreed: RunTerms) -> None:
    """What was agreed to."""
    counts = "" if agreed.uniform else f", weights = {agreed.weights}"
    counts += "" if agreed.metrics != "rounds" else ", metrics in every round"
    log.info(
        "terms",
        f"terms {agreed.digest.hex()[:16]} accepted: {agreed.method.method} under "
        f"{agreed.protection}, {agreed.clients} clients, quorum {agreed.quorum}, "
        f"c = {agreed.colluders}{counts}",
        digest=agreed.digest.hex(),
    )
    if agreed.noise.used:
        noise = agreed.noise
        log.info(
            "terms",
            f"every update's norm is clipped to {noise.clip:g}; a sum has noise of "
            f"{noise.multiplier:g} times that in each value, if {noise.honest} clients add theirs",
        )


def begun(log: Log, work: Work) -> None:
    """A round that this client works for."""
    if work.choice is None:
        plan = work.plan
        doing = "training" if plan.training else "counting right answers"
        log.debug("round", f"{round_of(plan)}: {doing}", learning_round=plan.learning_round)


def sent(log: Log, session: Session[LocalLearner], work: Work, weight: float) -> None:
    """An upload, what it says, and what this client's own images say."""
    plan, learner = work.plan, session.learner
    dp = learner.client.dp
    shield = "UNPROTECTED" if not plan.facts.hides else f"under {plan.protection}"
    if weight > plan.max_weight:
        log.warning(
            "sent", f"our {weight:g} images count as the plan's max_weight {plan.max_weight}"
        )
    if learner.diverged:
        log.warning(
            "sent", "training overflowed: the last prompt that had not is sent; ask the server's "
            "operator for a lower lr",
        )  # fmt: skip
    if learner.clipped:
        log.warning(
            "sent", f"{learner.clipped} values were beyond clip = {plan.clip:g}: the update was "
            "scaled down",
        )  # fmt: skip
    counts = "counts" if dp.kind == "none" else "zeros in the place of counts (dp)"
    what = f"update of norm {learner.norms[-1]:.2g}" if plan.training else counts
    weighs = "" if plan.uniform else f" for {weight:g} images"
    took = learner.seconds
    words = f"{round_of(plan)}: {what}{weighs} sent {shield}, after {took:.1f} s of local work"
    at = plan.learning_round
    log.info("sent", words, learning_round=at, protection=plan.protection, weight=weight,
             local_seconds=round(took, 4))  # fmt: skip
    if said := _figures(learner.figures):
        log.info("local", f"  {said}", learning_round=at, **asdict(learner.figures))
    if dp.kind == "sample" and plan.training:
        log.info(
            "epsilon",
            f"  privacy: epsilon {learner.spent:.4g} ({dp.accountant}) at delta {dp.delta:g} "
            f"spent so far, noise multiplier {learner.sigma:.3g}",
            learning_round=at, epsilon=learner.spent, delta=dp.delta, accountant=dp.accountant,
        )  # fmt: skip
    if plan.noise.used:
        delta = session.party.policy.client_delta
        spent = client_noise.epsilon(session.party.ledger.rho(), delta)
        log.info(
            "epsilon",
            f"  privacy of this client as a whole: epsilon {spent:.3g} at delta {delta:g} spent so "
            f"far, norm clipped to {plan.noise.clip:g}",
            learning_round=at, client_epsilon=spent, client_delta=delta,
        )  # fmt: skip


def _figures(own: Figures) -> str:
    parts = []
    if own.images:
        parts.append(
            f"of our {own.images} test images the global prompt got {own.correct / own.images:.1%} "
            f"right (zero-shot {own.zero_shot / own.images:.1%}), loss {own.loss:.3f}"
        )
    if own.first_loss is not None and own.last_loss is not None:
        change = f" -> {own.last_loss:.3f}" if own.last_loss != own.first_loss else ""
        parts.append(f"training loss {own.first_loss:.3f}{change}")
    return "; ".join(parts)


def sums(log: Log, session: Session[LocalLearner], told: int) -> int:
    """What newly checked sums say. Returns how many are told."""
    for number in sorted(session.history)[told:]:
        metrics = session.history[number]
        accuracy = f", accuracy before {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
        words = f"round {number}: sum of {metrics['contributors']:.0f} clients checked{accuracy}"
        log.info("opened", words, learning_round=number, metrics=metrics)
    return len(session.history)


def unverified(log: Log, session: Session[LocalLearner]) -> None:
    """That the final prompt is the server's word alone, if it is."""
    if session.verified or session.terms is None or not session.terms.facts.keyed:
        return
    log.warning(
        "unverified", "this client missed the last sum, and no round followed in which others "
        "vouched for what it gives: the final prompt is the server's word; another client's "
        "file holds the one that the sums give",
    )  # fmt: skip


def round_of(plan: RoundPlan) -> str:
    """A plan's place in its run, in words."""
    if not plan.training:
        return "final evaluation"
    return f"round {plan.learning_round}/{plan.rounds}"
