"""What a client accepts, whatever the server plans. The client's own file sets it.

The terms of a run are judged once. What is judged depends on no private number: a refusal tells the
server what the file says, and nothing about images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.client_noise import concentrated, effective, epsilon
from secure_fedprompt.protocol.errors import BudgetError, IsolationError, PolicyError
from secure_fedprompt.protocol.layout import METRICS
from secure_fedprompt.protocol.plan import RoundPlan, noise_colluders
from secure_fedprompt.protocol.protections import default_threshold, facts_of
from secure_fedprompt.protocol.schedule import slowest
from secure_fedprompt.protocol.settings import MethodSettings, Metrics, NonNegative, Weights
from secure_fedprompt.protocol.terms import RunTerms


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Local limits.

    Attributes:
        min_cohort: smallest cohort to take part in; below 3 a peer's update is a subtraction away.
        min_survivors: smallest number of updates in a sum that this client helps to open. -1 is
            everybody on the roster: who is in one of two sums only can be told by their difference.
        min_threshold: smallest t.
        colluders: clients that may collude with the server (masks), or pool what they know under an
            honest one (bfv, ckks), and still learn nothing more. -1 asks for what a federation of
            the whole roster gives; terms that tolerate fewer are refused.
        protections: allowed ones.
        methods: allowed ones; empty allows every method.
        graphs: allowed graphs of masks.
        metrics: what may be counted of this client: "off", "final" or "rounds". Who is in a sum
            learns what it counts, and counts of each round tell of who is missed in one. Empty
            allows all.
        weights: how it may weigh: "uniform", "bucket" or "samples". The sum of weights tells of
            image counts likewise. Empty allows all.
        key_makers: who may make the cohort key of bfv and ckks; empty allows every client. If none
            of them is left when a new key is needed, this client leaves the run.
        selections: whether others may choose what this client uploads: "secure" is server and
            helper, who must not collude, by the published rule; "secure-federation" is them over
            all clients' groups. Empty: this client chooses for itself.
        helpers: who may be the helper; empty allows every member of role helper on the roster.
        client_helpers: whether any client may be it as well. One that does not follow the protocol
            reads the scores of all others, and can open slots that were closed.
        min_fillers: fewest clients whose groups may be summed in one slot of "secure-federation";
            two more than ``colluders`` in any case.
        min_noise: smallest noise multiplier of client-level differential privacy, for every sum;
            0 asks for none. Terms with metrics are refused then.
        noise_colluders: clients of a quorum whose noise is not counted on; -1 is the c of terms on
            the complete graph, and one at least.
        client_delta: of max_client_epsilon.
        max_client_epsilon: most that all sums of this state_dir together may tell of this client as
            a whole, at client_delta; 0 is no limit. A run that would pass it is refused, and sums
            without noise, which nothing bounds. An upload that would pass it is zeros.
        min_clip: the least room for an update's values: less would cut off honest values, and what
            is cut off tells on which side of the bound a private number lies.
        min_weight: the least room for n_k, where it weighs.
        min_seen: the least room for counted test images, where they are counted.
        min_lr: smallest learning rate of local training, in every round; the less a prompt moves,
            the better can sums of two rounds be subtracted.
        max_lr: its largest.
        max_momentum: its largest momentum.
        max_weight_decay: its largest weight decay.
        max_batch_size: its most images in a step: where memory ends, a site with more images fails.
        max_epochs: its most epochs of a round.
        max_rounds: most learning rounds of one run, and half the attempts at them.
        allow_late_join: take part in a run that began without this client's nonce, and come back to
            one that went on without it.
    """

    min_cohort: int = 3
    min_survivors: Annotated[int, Meta(ge=-1)] = 3
    min_threshold: int = 2
    colluders: int = -1
    protections: tuple[str, ...] = ("masks",)
    methods: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ("complete",)
    metrics: tuple[Metrics, ...] = ("off", "final")
    weights: tuple[Weights, ...] = ("uniform",)
    key_makers: tuple[str, ...] = ()
    selections: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    client_helpers: bool = False
    min_fillers: int = 3
    min_noise: NonNegative = 0.0
    noise_colluders: Annotated[int, Meta(ge=-1)] = -1
    max_client_epsilon: NonNegative = 0.0
    client_delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    min_clip: float = 0.1
    min_weight: int = 256
    min_seen: int = 4096
    min_lr: NonNegative = 0.0
    max_lr: float = 1.0
    max_momentum: float = 0.95
    max_weight_decay: float = 0.1
    max_batch_size: int = 1024
    max_epochs: int = 1000
    max_rounds: int = 1000
    allow_late_join: bool = True

    def check_terms(self, terms: RunTerms, roster_clients: int) -> None:
        """Refuse terms outside the limits, once for the run.

        Args:
            roster_clients: clients on this client's own roster.

        Raises:
            PolicyError: naming the limit, its value and the terms'.
        """
        method = terms.method
        self.check_outline(
            method.method, terms.protection, terms.clients, terms.quorum, roster_clients
        )
        if terms.rounds > self.max_rounds:
            raise PolicyError(_above("max_rounds", self.max_rounds, f"{terms.rounds} rounds"))
        rooms = [("min_clip", self.min_clip, terms.clip, True),
                 ("min_clip", self.min_clip, terms.noise.clip, terms.noise.used),
                 ("min_weight", self.min_weight, terms.max_weight, not terms.uniform),
                 ("min_seen", self.min_seen, terms.max_seen, terms.metrics != "off")]  # fmt: skip
        for limit, least, found, used in rooms:
            if used and found < least:
                raise PolicyError(_below(limit, least, f"room for {found:g}"))
        self.check_training(method, terms.rounds)
        if self.min_noise and terms.metrics != "off":
            raise PolicyError(
                f"terms have metrics = {terms.metrics!r}, exact sums without noise, but "
                f"policy.min_noise is {self.min_noise:g}: metrics must be 'off'"
            )
        if self.metrics and terms.metrics not in self.metrics:
            raise PolicyError(_outside("metrics", self.metrics, terms.metrics))
        if self.weights and terms.weights not in self.weights:
            raise PolicyError(_outside("weights", self.weights, terms.weights))
        self._check_noise(terms.plan(terms.sample(1)))
        if not terms.facts.hides:
            return
        self._check_colluders(
            terms.protection, bool(terms.regular), terms.clients, terms.quorum, terms.colluders,
            roster_clients,
        )  # fmt: skip
        if terms.facts.masked:
            graph = "regular" if terms.regular else "complete"
            if graph not in self.graphs:
                raise PolicyError(_outside("graphs", self.graphs, graph))
        makers = terms.makers if terms.facts.encrypted else self.key_makers
        if self.key_makers and not set(self.key_makers) & set(makers):
            raise PolicyError(_outside("key_makers", self.key_makers, ", ".join(makers)))

    def check_training(self, method: MethodSettings, rounds: int) -> None:
        """Refuse training settings outside the limits.

        Args:
            rounds: learning rounds of the run; 1 if that is not known.

        Raises:
            PolicyError: naming the limit, its value and the setting's.
        """
        for key in ("lr", "momentum", "weight_decay", "batch_size", "epochs"):
            most, found = getattr(self, f"max_{key}"), getattr(method, key)
            if found > most:
                raise PolicyError(_above(f"max_{key}", most, f"{key} {found:g}"))
        lowest, number = slowest(method, rounds)
        if lowest < self.min_lr:
            raise PolicyError(_below("min_lr", self.min_lr, f"lr {lowest:g} in round {number}"))

    def check_outline(
        self, method: str, protection: str, clients: int, quorum: int, roster_clients: int
    ) -> None:
        """Refuse what is known of terms before a run: also for who only asks.

        Args:
            roster_clients: clients on this client's own roster.

        Raises:
            PolicyError: naming the limit, its value and the terms'.
        """
        if self.methods and method not in self.methods:
            raise PolicyError(_outside("methods", self.methods, method))
        if protection not in self.protections:
            raise PolicyError(_outside("protections", self.protections, protection))
        if clients < self.min_cohort:
            raise PolicyError(
                _below("min_cohort", self.min_cohort, f"cohorts of {clients} at most")
            )
        if facts_of(protection).hides:
            self._check_members(f"quorum {quorum}", quorum, roster_clients)

    def _check_members(self, what: str, members: int, roster_clients: int) -> None:
        if self.min_survivors < 0 and members < roster_clients:
            raise PolicyError(
                f"the server plans {what}, but policy.min_survivors is -1: everybody, which is "
                f"{roster_clients} clients on our roster; the server's file needs threshold = -1"
            )
        if members < self.min_survivors:
            raise PolicyError(_below("min_survivors", self.min_survivors, what))

    def _check_colluders(
        self, protection: str, regular: bool, clients: int, quorum: int, found: int, roster: int
    ) -> None:
        wanted = self._wanted(protection, regular, roster)
        if found < wanted:
            raise PolicyError(
                f"a quorum of {quorum} of {clients} clients tolerates {found} colluders, but "
                f"policy.colluders asks for {wanted} ({roster} clients are on our roster)"
            )

    def _wanted(self, protection: str, regular: bool, roster: int) -> int:
        """Colluders that this client wants to be safe from."""
        if self.colluders >= 0:
            return self.colluders
        return facts_of(protection).tolerated(regular, roster, default_threshold(roster))

    def _check_fillers(self, plan: RoundPlan, roster: int) -> None:
        """A slot's mean tells those who fill it of the others."""
        found, limit = plan.selection.fillers, self.min_fillers
        if found < limit:
            raise PolicyError(_below("min_fillers", limit, f"{found} fillers"))
        c = self._wanted(plan.protection, plan.degree > 0, roster) if plan.facts.hides else 0
        if c and found < c + 2:
            raise PolicyError(
                f"the server plans {found} fillers of a slot, of whom {c} could collude "
                f"(policy.colluders): at least {c + 2}, selection_fillers in the server's file"
            )

    def check_plan(self, plan: RoundPlan, roster_clients: int) -> None:
        """Refuse a plan outside the limits.

        Args:
            roster_clients: clients on this client's own roster.

        Raises:
            PolicyError: naming the limit, its value and the plan's.
        """
        graph = "regular" if plan.degree else "complete"
        n = len(plan.cohort)
        if plan.protection not in self.protections:
            raise PolicyError(_outside("protections", self.protections, plan.protection))
        if self.methods and plan.method not in self.methods:
            raise PolicyError(_outside("methods", self.methods, plan.method))
        if plan.rounds > self.max_rounds:
            raise PolicyError(_above("max_rounds", self.max_rounds, f"{plan.rounds} rounds"))
        if plan.round > 2 * self.max_rounds:
            raise PolicyError(_above("max_rounds", self.max_rounds, f"attempt {plan.round}"))
        self._check_noise(plan)
        if plan.selecting and plan.selection.kind not in self.selections:
            raise PolicyError(_outside("selections", self.selections, plan.selection.kind))
        if plan.selecting and self.helpers and plan.selection.helper not in self.helpers:
            raise PolicyError(_outside("helpers", self.helpers, plan.selection.helper))
        if plan.selection.federation:
            self._check_fillers(plan, roster_clients)
        if n < self.min_cohort:
            raise PolicyError(_below("min_cohort", self.min_cohort, f"a cohort of {n}"))
        if not plan.facts.hides:
            return
        self._check_members(f"quorum {plan.quorum}", plan.quorum, roster_clients)
        if not plan.degree:  # else the terms tell which corruption chose it
            found = plan.facts.tolerated(False, plan.members, plan.quorum)
            self._check_colluders(
                plan.protection, False, plan.members, plan.quorum, found, roster_clients
            )
        if plan.encrypted:
            if self.key_makers and plan.maker not in self.key_makers:
                raise PolicyError(_outside("key_makers", self.key_makers, plan.maker))
            return
        if graph not in self.graphs:
            raise PolicyError(_outside("graphs", self.graphs, graph))
        if plan.threshold < self.min_threshold:
            raise PolicyError(_below("min_threshold", self.min_threshold, f"t = {plan.threshold}"))

    def _shares(self, plan: RoundPlan) -> int:
        """Clients of a sum whose noise counts."""
        colluders = noise_colluders(self.noise_colluders, plan.members, plan.quorum)
        return max(0, min(plan.noise.honest, plan.quorum - colluders))

    def _check_noise(self, plan: RoundPlan) -> None:
        if not self.min_noise:
            return
        if any(field.name in METRICS for field in plan.layout):
            raise PolicyError("plan has metrics, which carry no noise, but policy.min_noise is set")
        shares = self._shares(plan)
        found = effective(plan.noise, plan.layout, shares)  # 0 without any
        if plan.training and found < 0.99 * self.min_noise:
            raise PolicyError(
                f"plan's noise multiplier is worth {found:.3g}, if {shares} of {plan.quorum} "
                f"clients add theirs, but policy.min_noise is {self.min_noise:g}"
            )

    def cost(self, plan: RoundPlan) -> float:
        """What a sum tells of one client as a whole, rho under zero-concentrated DP."""
        if not plan.telling:
            return 0.0
        return concentrated(plan.noise, plan.layout, self._shares(plan))

    def check_budget(self, terms: RunTerms, others: float, own: float) -> None:
        """Refuse a run that ``max_client_epsilon`` does not last for.

        Args:
            others: rho of this client's uploads in other runs; own: in this one, so far.

        Raises:
            BudgetError: with the figures. They are for this client's user: the server would learn
                from them what this client does elsewhere.
        """
        if not self.max_client_epsilon:
            return
        first, last = 1, terms.rounds + terms.evaluations
        planned = max(1, terms.rounds) * self.cost(terms.plan(terms.sample(first)))
        if terms.evaluations:
            planned += self.cost(terms.plan(terms.sample(last)))
        needed, spent = (
            epsilon(others + more, self.client_delta) for more in (max(own, planned), own)
        )
        if needed > self.max_client_epsilon:
            raise BudgetError(
                f"policy.max_client_epsilon = {self.max_client_epsilon:g}: epsilon {spent:.3g} at "
                f"delta {self.client_delta:g} is spent on this client's uploads, the run's "
                f"{terms.rounds} rounds would make it {needed:.3g}; raise it, or ask the server's "
                "operator for more dp_noise"
            )


def check_isolation(new: Sequence[str], earlier: Iterable[Sequence[str]], colluders: int) -> None:
    """Refuse a survivor list that, with lists of nearly the same base, would isolate a few.

    Sums over several lists can be combined into sums over the classes of clients that are on the
    same ones of these lists, and into nothing finer: every class must hide an honest client among
    others. A list that was there before makes no new class.

    Args:
        new: the list to be signed.
        earlier: lists whose sums may have been opened for a base near this one.
        colluders: c.

    Raises:
        IsolationError: naming the smallest class.
    """
    before = {tuple(names) for names in earlier}
    if not before or tuple(new) in before:
        return
    lists = [set(new), *map(set, before)]
    classes: dict[tuple[bool, ...], list[str]] = {}
    for name in sorted(set().union(*lists)):
        classes.setdefault(tuple(name in members for members in lists), []).append(name)
    least = min(classes.values(), key=len)
    if len(least) < colluders + 2:
        raise IsolationError(
            f"survivor list, with {len(before)} earlier of nearly the same prompt, would single "
            f"out {', '.join(least)}: at least {colluders + 2} clients must change together"
        )


def _outside(limit: str, allowed: Sequence[str], value: str) -> str:
    return (
        f"the server wants {value!r}, but policy.{limit} allows only {', '.join(allowed) or 'none'}"
    )


def _below(limit: str, allowed: float, value: str) -> str:
    return f"the server plans {value}, but policy.{limit} is {allowed:g}"


def _above(limit: str, allowed: float, value: str) -> str:
    return f"the server plans {value}, but policy.{limit} is {allowed:g}"
