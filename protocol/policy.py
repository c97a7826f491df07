"""What a client accepts, whatever the server plans. The client's own file sets it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from secure_fedprompt.protocol.client_noise import effective
from secure_fedprompt.protocol.errors import PolicyError
from secure_fedprompt.protocol.layout import METRICS
from secure_fedprompt.protocol.plan import RoundPlan


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Local limits.

    Attributes:
        min_cohort: smallest cohort to take part in; below 3 a peer's update is a subtraction away.
        min_survivors: smallest number of updates in a sum that this client helps to open.
        min_threshold: smallest t.
        min_threshold_share: on the complete graph t must also exceed this share of the cohort. With
            the default of two thirds, a third of the clients may collude with the server.
        protections, methods, graphs: allowed values; an empty ``methods`` allows every method.
        key_makers: who may make the cohort key of bfv and ckks; empty allows every client. If none
            of them is left when a new key is needed, this client leaves the run.
        selections: whether others may choose what this client uploads: "secure" is server and
            helper, who must not collude, by the published rule; "secure-federation" is them over
            all clients' groups. Empty: this client chooses for itself.
        helpers: who may be the helper; empty allows every client and helper on the roster.
        min_fillers: fewest clients whose groups may be summed in one slot of "secure-federation".
        min_noise: smallest noise multiplier of client-level differential privacy, for every sum;
            0 asks for none. Plans with metrics are refused then.
        noise_colluders: clients of a quorum whose noise must not be counted on.
        max_rounds: most learning rounds of one run, and half the attempts at them.
        allow_late_join: take part in a run that began without this client's nonce.
        min_survivor_change: refuse a survivor list that differs from an earlier one of the run
            by fewer clients than this, unless equal. Add the colluders you expect: swapping them
            counts as change. 0 is off: it would let one dropout stop a run.
    """

    min_cohort: int = 3
    min_survivors: int = 3
    min_threshold: int = 2
    min_threshold_share: float = 2 / 3
    protections: tuple[str, ...] = ("masks",)
    methods: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ("complete",)
    key_makers: tuple[str, ...] = ()
    selections: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    min_fillers: int = 3
    min_noise: float = 0.0
    noise_colluders: int = 0
    max_rounds: int = 1000
    allow_late_join: bool = True
    min_survivor_change: int = 0

    def check_plan(self, plan: RoundPlan) -> None:
        """Refuse a plan outside the limits.

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
            raise PolicyError(_below("max_rounds", self.max_rounds, f"{plan.rounds} rounds"))
        if plan.round > 2 * self.max_rounds + 8:
            raise PolicyError(_below("max_rounds", self.max_rounds, f"attempt {plan.round}"))
        if self.min_noise and any(field.name in METRICS for field in plan.layout):
            raise PolicyError("plan has metrics, which carry no noise, but policy.min_noise is set")
        if self.min_noise and plan.training:
            found = effective(plan.noise, plan.layout) if plan.noise.used else 0.0
            if found < 0.99 * self.min_noise:
                raise PolicyError(
                    f"plan's noise multiplier is worth {found:.3g}, but policy.min_noise is "
                    f"{self.min_noise:g}"
                )
            if plan.noise.honest > plan.quorum - self.noise_colluders:
                raise PolicyError(
                    f"plan counts on the noise of {plan.noise.honest} of {plan.quorum} clients, "
                    f"but policy.noise_colluders is {self.noise_colluders}"
                )
        if plan.selecting and plan.selection.kind not in self.selections:
            raise PolicyError(_outside("selections", self.selections, plan.selection.kind))
        if plan.selecting and self.helpers and plan.selection.helper not in self.helpers:
            raise PolicyError(_outside("helpers", self.helpers, plan.selection.helper))
        if plan.selection.federation and plan.selection.fillers < self.min_fillers:
            fillers = f"{plan.selection.fillers} fillers"
            raise PolicyError(_below("min_fillers", self.min_fillers, fillers))
        if n < self.min_cohort:
            raise PolicyError(_below("min_cohort", self.min_cohort, f"a cohort of {n}"))
        if plan.protection == "none":
            return
        if plan.quorum < self.min_survivors:
            raise PolicyError(_below("min_survivors", self.min_survivors, f"quorum {plan.quorum}"))
        if plan.encrypted:
            if self.key_makers and plan.maker not in self.key_makers:
                raise PolicyError(_outside("key_makers", self.key_makers, plan.maker))
            return
        if graph not in self.graphs:
            raise PolicyError(_outside("graphs", self.graphs, graph))
        if plan.threshold < self.min_threshold:
            raise PolicyError(_below("min_threshold", self.min_threshold, f"t = {plan.threshold}"))
        if plan.quorum <= self.min_threshold_share * n:
            raise PolicyError(
                f"plan has t = {plan.quorum} of {n} clients, but policy.min_threshold_share is "
                f"{self.min_threshold_share:.2f}: a smaller t lets fewer colluders open updates"
            )

    def check_survivors(self, new: Sequence[str], earlier: Iterable[Sequence[str]]) -> None:
        """Refuse a survivor list that is too short or too close to an earlier one of the run.

        Raises:
            PolicyError: naming the limit.
        """
        if len(new) < self.min_survivors:
            limit = self.min_survivors
            raise PolicyError(_below("min_survivors", limit, f"{len(new)} survivors"))
        for old in earlier:
            change = len(set(new) ^ set(old))
            if 0 < change < self.min_survivor_change:
                raise PolicyError(
                    f"survivor list differs from an earlier one by {change} clients, "
                    f"policy.min_survivor_change is {self.min_survivor_change}"
                )


def _outside(limit: str, allowed: Sequence[str], value: str) -> str:
    return f"plan wants {value!r}, but policy.{limit} allows only {', '.join(allowed) or 'none'}"


def _below(limit: str, allowed: int, value: str) -> str:
    return f"plan has {value}, but policy.{limit} is {allowed}"
