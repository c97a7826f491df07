"""A client over a whole run, as a state machine without I/O.

``on(message)`` returns frames to send. When a round is ready for an update, ``work`` holds its
plan and the global prompt; the caller trains and hands the result to ``trained``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from secure_fedprompt.clients import participant
from secure_fedprompt.clients.encrypted import Opening
from secure_fedprompt.clients.helper import Helper
from secure_fedprompt.clients.selecting import share_keys
from secure_fedprompt.clients.state import Party, Ready, Replies, State
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, averaged, metrics_of, prompt_bytes
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    FieldError,
    HomomorphicError,
    MismatchError,
    PolicyError,
    ProtocolError,
    ReplayError,
    RunFailedError,
    SealError,
    SecureFedPromptError,
    SelectionError,
    SignatureError,
    SurvivorError,
    UnexpectedMessageError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import TensorSpec, Values
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.settings import MethodSettings

MAX_WITHDRAWN = 3  # rounds in a row
ROUND_ERRORS = (  # a peer's doing
    SealError, AdvertMismatchError, SurvivorError, SignatureError, HomomorphicError, SelectionError,
)  # fmt: skip
SEAL_BYTES = 16  # that sealing a prompt adds
_SAME_START = 1e-5  # initial prompts of two machines may differ by this much


class Workload(Protocol):
    """The private side of a client: model, data and method."""

    model_fingerprint: bytes
    classes_digest: bytes
    class_count: int

    def prepare(self, settings: MethodSettings) -> None:
        """Build the method of the run."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        """What is uploaded."""

    def initial(self) -> Prompt:
        """The starting prompt, flat float32, from settings and model alone."""


@dataclass(frozen=True)
class Work:
    """A round that waits for an update, or for selection keys.

    Attributes:
        choice: of server and helper, where they select, once they have.
    """

    plan: RoundPlan
    base: Prompt
    choice: Choice | None = None


class Session:
    """One client in one run.

    Attributes:
        work: the round to train for, or None.
        final: the last global prompt, once the run has ended well.
        history: aggregate metrics by learning round, where clients and not the server open sums.
    """

    def __init__(self, party: Party, workload: Workload, method: str = "") -> None:
        self.party, self.workload, self.method = party, workload, method
        self.nonce = party.entropy(32)
        self.run = b""
        self.settings: MethodSettings | None = None
        self.round: State | None = None
        self.work: Work | None = None
        self.history: dict[int, dict[str, float]] = {}
        self._entered: RoundPlan | None = None  # the round that we could withdraw from
        self._sealed: bool | None = None  # whether prompts come sealed, once a plan has told
        self._raw = b""  # the global prompt of the plan, as it came
        self._opened: tuple[int, dict[str, float]] | None = None  # until the round is over
        self._made: tuple[int, bytes] | None = None  # the next prompt, as we computed it
        self._agreed: tuple[int, bytes] | None = None  # the same, once the round is over
        self._withdrawn = 0
        self._progress = (1, 0)  # learning round, rounds of the run
        self._helper = Helper(party)
        self.final: Prompt | None = None
        self.over = False

    def hello(self) -> m.Hello:
        """The first frame of each connection; anything under way is given up."""
        self.round = self.work = self._entered = None
        self._helper.reset()
        w = self.workload
        return m.Hello(
            self.nonce,
            self.method,
            w.model_fingerprint,
            w.classes_digest,
            w.class_count,
            self.party.roster.digest,
        )

    def on(self, message: m.Message) -> Replies:
        """Take one frame.

        Raises:
            SecureFedPromptError: this client refuses, or the server refused it; it must leave.
        """
        match message:
            case m.Refused():
                raise _refusal(message)
            case m.Welcome():
                return self._welcome(message)
            case m.Finish():
                return self._finish(message)
            case m.Plan():
                return self._plan(message)
            case m.Rejoin():
                return [self.hello()]
            case m.LogHead():
                self.party.check_head(message)
                return []
            case m.HelperPlan() | m.HelperAnswer() | m.HelperInputs() | m.HelperTables():
                return self._help(message)
            case m.RoundEnd():
                self._helper.end(message.run, message.round)
                if self.round and (message.run, message.round) == (self.run, self.round.plan.round):
                    self.round = self.work = self._entered = None
                    self._agreed = self._agreed if message.reason else self._made or self._agreed
                    self._conclude(done=not message.reason)
                return []
        if self.round is None:
            return []  # a frame of a round that a reconnection ended
        self.round, replies = self.round.on(message)
        return self._ready(replies)

    def trained(self, work: Work, result: tuple[Values, float] | Keys) -> Replies:
        """Send the result of ``work``, an update or selection keys, unless the round has ended."""
        state = self.round
        if not isinstance(state, Ready) or state.plan is not work.plan:
            return []
        self.work = None
        if isinstance(result, tuple):
            self._withdrawn = 0
            self.round, replies = state.upload(*result)
        else:
            self.round, replies = share_keys(state, result)
        return replies

    def _help(self, message: m.Message) -> Replies:
        """A frame for the helper that this client was elected to be."""
        if self.round is None:
            return []  # of a round that a reconnection or withdrawal ended
        if isinstance(message, m.HelperPlan) and message.plan.digest != self.round.plan.digest:
            raise UnexpectedMessageError("a selection of another round than this client's")
        return self._helper.on(message)

    def withdraw(self, error: SecureFedPromptError) -> Replies:
        """Leave the current round, not the run.

        Raises:
            SecureFedPromptError: ``error`` itself, if it concerns more than a round, or is the
                third in a row.
        """
        plan, self._entered, self.round, self.work = self._entered, None, None, None
        self._withdrawn += 1
        if not isinstance(error, ROUND_ERRORS) or plan is None or self._withdrawn >= MAX_WITHDRAWN:
            raise error
        # What a sum or an outcome opens to is not for the server, not even in an error.
        reason = "" if isinstance(error, HomomorphicError | SelectionError) else m.line(error)
        return [m.Withdraw(plan.run, plan.round, type(error).__name__, reason)]

    def leave(self, error: SecureFedPromptError) -> m.Leave:
        """The last frame. Only errors about what the server itself sent carry their text."""
        told = isinstance(error, ProtocolError | MismatchError)
        told = told and not isinstance(error, HomomorphicError)
        return m.Leave(type(error).__name__ if told else "Stopped", m.line(error) if told else "")

    def _welcome(self, message: m.Welcome) -> Replies:
        if message.run != m.run_id(message.server_nonce, message.nonces):
            raise ReplayError("run id is not the digest of the run's nonces")
        ours = m.Nonce(self.party.name, self.nonce) in message.nonces
        if not (ours or self.party.journal.knows(message.run) or self.party.policy.allow_late_join):
            raise PolicyError(
                "run began without this client's nonce, and policy.allow_late_join is false"
            )
        if self.run not in (b"", message.run):
            raise ReplayError("welcome to another run: start this client again to join it")
        settings = MethodSettings.from_bytes(message.settings)
        if self.settings not in (None, settings):
            raise MismatchError("the run's settings changed: start this client again")
        allowed = self.party.policy.methods
        if allowed and settings.method not in allowed:
            raise PolicyError(
                f"run wants method {settings.method!r}, policy.methods allows {', '.join(allowed)}"
            )
        if self.settings is None:
            self.workload.prepare(settings)
        self.settings, self.run = settings, message.run
        ready = self.party.ready(self.run)
        if not message.need_initial:
            return [ready]
        vector = prompt_bytes(self.workload.initial())
        return [m.Initial(self.run, self.workload.tensors(), vector), ready]

    def _plan(self, message: m.Plan) -> Replies:
        plan, settings = message.plan, self.settings
        if settings is None or plan.run != self.run:
            raise UnexpectedMessageError("plan of a run that did not welcome us")
        if digest(Purpose.BASE, message.base) != plan.base_digest:
            raise MismatchError("global prompt is not the one that the plan names")
        expected: dict[str, tuple[str | bytes, str | bytes]] = {
            "method": (plan.method, settings.method),
            "settings": (plan.settings_digest, digest(Purpose.SETTINGS, settings.to_bytes())),
            "model": (plan.model_fingerprint, self.workload.model_fingerprint),
            "classes": (plan.classes_digest, self.workload.classes_digest),
        }
        for what, (theirs, ours) in expected.items():
            if theirs != ours:
                raise MismatchError(f"plan's {what} is {_show(theirs)}, ours is {_show(ours)}")
        updates = [(f.name, tuple(f.shape)) for f in plan.layout if f.update]
        own = [(t.name, tuple(t.shape)) for t in self.workload.tensors()]
        if plan.training and updates != own:
            raise MismatchError(f"plan wants the tensors {updates}, our method uploads {own}")
        chosen, o = plan.selection, settings.fedmgp
        if plan.selecting and (chosen.groups, chosen.slots, chosen.modalities) != (
            o.groups, o.slots, len(own)
        ):  # fmt: skip
            raise MismatchError(
                f"plan selects {chosen.slots} of {chosen.groups} groups, settings say {o.slots} "
                f"of {o.groups}"
            )
        if plan.learning_round < self._progress[0] or plan.rounds != (
            self._progress[1] or plan.rounds
        ):
            raise ReplayError(
                f"plan is for learning round {plan.learning_round} of {plan.rounds}, "
                f"after {self._progress[0]} of {self._progress[1]}"
            )
        self.work, self._entered, self._made, self._sealed = None, plan, None, plan.encrypted
        self._conclude(done=plan.learning_round > self._progress[0])  # if its end was lost
        self._raw = bytes(message.base)
        if not (plan.encrypted and plan.learning_round > 1):
            self._prompt(plan, self._raw)  # refused before anything is done
        self.round, replies = participant.start(self.party, plan)
        self._progress = plan.learning_round, plan.rounds
        return self._ready(replies)

    def _conclude(self, *, done: bool) -> None:
        """Keep what was opened if its round counts, else forget it."""
        if self._opened and done:
            self.history[self._opened[0]] = self._opened[1]
        self._opened = None

    def _prompt(self, plan: RoundPlan, data: bytes) -> Prompt:
        """The global prompt in the clear, checked as far as it can be."""
        size = sum(tensor.size for tensor in self.workload.tensors())
        if len(data) != 4 * size:
            raise MismatchError(f"global prompt has {len(data)} bytes, our method {4 * size}")
        base = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(base).all():
            raise FieldError("global prompt holds NaN or infinity")
        if plan.learning_round == 1 and not np.allclose(
            base, self.workload.initial(), rtol=0, atol=_SAME_START
        ):
            raise MismatchError("starting prompt is not what our model and the settings give")
        if self._agreed and self._agreed[0] == plan.learning_round and self._agreed[1] != data:
            raise MismatchError("global prompt is not the one that the last sum gives")
        return base

    def _open(self, plan: RoundPlan) -> bytes:
        """The plan's global prompt, unsealed if clients sealed it."""
        if not plan.encrypted or plan.learning_round == 1:
            return self._raw
        cohort = self.party.keyring.cohort
        assert cohort is not None
        return cohort.open_prompt(plan.run, plan.learning_round, self._raw)

    def _ready(self, replies: Replies) -> Replies:
        """Take up what the new state asks the caller or us to do."""
        state = self.round
        if isinstance(state, Ready) and self.work is None:
            if state.choice is None:
                self._base = self._prompt(state.plan, self._open(state.plan))
            self.work = Work(state.plan, self._base, state.choice)
        if isinstance(state, Opening):
            plan = state.plan
            self._opened = plan.learning_round, metrics_of(state.total)
            data = b""
            if plan.training:
                data = prompt_bytes(averaged(self._base, plan.layout, state.total))
                self._made = plan.learning_round + 1, data
            self.round, more = state.report(data)
            replies = replies + more
        return replies

    def _finish(self, message: m.Finish) -> Replies:
        if not self.run:
            raise RunFailedError("the run ended before this client could take part")
        if message.run != self.run:
            return []
        self.over = True
        self._conclude(done=not message.reason)
        if message.reason:
            raise RunFailedError(f"server ended the run: {message.reason}")
        size, data = sum(t.size for t in self.workload.tensors()), bytes(message.vector)
        if self._sealed and (cohort := self.party.keyring.cohort):
            last = self._progress[1] + 1  # the round that the final prompt would be the start of
            data = cohort.open_prompt(self.run, last, data)
        if len(data) != 4 * size:
            if len(data) == 4 * size + SEAL_BYTES:
                raise RunFailedError(
                    "the run ended before this client was given its key: ask another client for "
                    "the prompt"
                )
            raise FieldError(f"final prompt of {len(data)} bytes, {4 * size} expected")
        final = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(final).all():
            raise FieldError("final prompt holds NaN or infinity")
        self.final = final
        return []


def _show(value: str | bytes) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else repr(value)


def _refusal(message: m.Refused) -> SecureFedPromptError:
    """The server's refusal as the error class it names, if that is one a server may name."""
    known = {cls.__name__: cls for cls in (MismatchError, RunFailedError)}
    return known.get(message.error, RunFailedError)(f"server refuses us: {message.reason}")
