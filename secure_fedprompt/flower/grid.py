"""``SecureGrid``: the ServerApp's half. A strategy gets one reply, with the average.

    grid = SecureGrid(grid, context, rounds=3)
    FedAvg().start(grid=grid, initial_arrays=arrays, num_rounds=3)

A batch of "train" messages becomes one learning round of our run: the frames of its stages travel
as Flower messages, clients train once, and what comes back is a single reply with the average of
their arrays. Server and clients are the state machines of the programs, with their terms, policies,
audit log and checked sums.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies

from secure_fedprompt.flower import wire
from secure_fedprompt.flower.form import Form
from secure_fedprompt.flower.hub import GridHub
from secure_fedprompt.host import command
from secure_fedprompt.host.files import member_of, read_identity, read_roster
from secure_fedprompt.host.recorded import RecordedHub
from secure_fedprompt.host.recorder import recorder
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import ConfigError, LinkError, RunFailedError
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.protections import facts_of
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Hub
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.run import Run
from secure_fedprompt.server.serve import CountedHub, hear, post
from secure_fedprompt.server.settings import ServerSettings, check_settings
from secure_fedprompt.server.store import TROUBLE, Store

LOG = logging.getLogger("flwr")
SETTINGS = (  # of a server that mean something here
    "graph", "threshold", "min_clients", "max_dropout", "max_corruption", "ring_bits",
    "clip", "weights", "max_weight", "dp_noise", "dp_clip", "dp_colluders", "gather_seconds",
    "stage_seconds", "training_seconds", "upload_after", "max_attempts", "audit", "audit_mb",
)  # fmt: skip
READING = (  # single replies, or how many there are
    "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg", "FedXgbBagging",
    "FedXgbCyclic", "DifferentialPrivacyServerSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyClientSideAdaptiveClipping",
)  # fmt: skip
CHANGING = (  # the average, before it is the next base
    "FedOpt", "FedAvgM", "DifferentialPrivacyClientSideFixedClipping",
)  # fmt: skip
WAITS = {"stage_seconds": 120.0, "gather_seconds": 120.0, "max_attempts": 3}
_STEP = 0.2


class SecureGrid(Grid):  # type: ignore[misc]
    """A grid whose "train" batches are averaged under masks.

    Args:
        grid: Flower's own.
        context: of the ServerApp; clients must have been given the same run config.
        rounds: learning rounds, which are in the terms; 0 takes "num-server-rounds" of the run
            config.
        key, roster: files of this server, as everywhere. Empty in Flower's simulation only: nodes
            are enrolled as they are met, and real ones refuse that.
        run_dir: folder of the record and the audit log.
        exclude: patterns of names of arrays that are not averaged, such as
            ``["*.num_batches_tracked"]``.
        weighted_by: metric of the apps' replies that says how many images they trained on; it
            counts with ``weights`` "samples" or "bucket", and is always protected.
        server_optimizer: the strategy changes the average before it is the next base. The terms
            say so, clients' policies have to allow the method "flower-optimizer", and nobody can
            check that a base follows from the sum before.
        settings: those of ``SETTINGS``, as in the server's file.

    Attributes:
        secure_run: our run, once the first batch was sent. folder: of its record.

    Raises:
        ConfigError: a setting is unknown, of the wrong type, or means nothing here; names it.
    """

    def __init__(
        self,
        grid: Grid,
        context: Context,
        *,
        rounds: int = 0,
        key: str = "",
        roster: str = "",
        run_dir: str = "runs/{time}",
        exclude: Sequence[str] = (),
        weighted_by: str = "num-examples",
        server_optimizer: bool = False,
        **settings: Any,
    ) -> None:
        if bool(key) != bool(roster):
            raise ConfigError("SecureGrid: key and roster belong together")
        rounds = rounds or int(context.run_config.get("num-server-rounds", 0))
        if rounds < 1:
            raise ConfigError(f"SecureGrid: rounds = {rounds}: as many as the strategy has")
        protection = str(settings.pop("protection", ServerSettings().protection))
        if not (facts := facts_of(protection)).masked:
            why = "the server would know no average" if facts.encrypted else "it protects nothing"
            raise ConfigError(f"SecureGrid: protection = {protection!r}: {why}; use masks")
        for name in settings:
            if name not in SETTINGS:
                raise ConfigError(
                    f"SecureGrid: {name} means nothing here; {', '.join(SETTINGS)} do"
                )
        given = {**WAITS, **settings, "rounds": rounds}
        made = command.build(ServerSettings, {**given, "metrics": "off"}, "SecureGrid")
        method = "flower-optimizer" if server_optimizer else "flower"
        made = msgspec.structs.replace(
            made, method=method, alive_seconds=1e12, patience=made.gather_seconds
        )
        check_settings(made)
        self._settings, self._given = made, frozenset(settings)
        self._grid, self._config = grid, dict(context.run_config)
        self._run_id = context.run_id
        self._key, self._roster, self._dir = key, roster, run_dir
        self._exclude, self._weighted_by = tuple(exclude), weighted_by
        self._chained = not server_optimizer
        self._skew, self._warned = 0.0, set[str]()
        self._closing: tuple[Any, ...] = ()
        self.folder: Path | None = None
        self.secure_run: Run | None = None

    # -- what Flower asks of a grid ----------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._grid.get_node_ids())

    def get_nodes(self) -> Iterable[NodeInfo]:
        return list(self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise ConfigError("SecureGrid: only send_and_receive is protected: use it")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise ConfigError("SecureGrid: only send_and_receive is protected: use it")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """One learning round; the reply has the average, and nothing of any client.

        A batch of another kind than "train" is not sent, since its replies would be in the clear:
        there is no reply to it.

        Raises:
            ConfigError: the batch, or the strategy, cannot be averaged.
            RunFailedError: too few clients, or a round kept aborting.
        """
        batch = list(messages)
        kinds = sorted({message.metadata.message_type for message in batch})
        if not batch:
            return []
        if kinds[0].split(".")[0] != "train":
            self._warn(
                f"{kinds[0]} messages are not sent: what clients answered would be in the clear. "
                "Evaluate the average where the server is (evaluate_fn), or set "
                "fraction_evaluate=0"
            )
            return []
        if len(kinds) > 1:
            raise ConfigError(f"SecureGrid: one kind of message at a time, not {', '.join(kinds)}")
        weighing = self._strategy()
        try:
            return [self._average(batch, timeout, weighing)]
        except BaseException:
            self.close()
            raise

    def _strategy(self) -> str:
        """The key that the strategy weighs replies by; refuses one that would not do as it says."""
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, strategies.Strategy):
                names = {cls.__name__ for cls in type(caller).__mro__}
                if found := sorted(names & set(READING)):
                    raise ConfigError(
                        f"SecureGrid: {found[0]} reads single replies, and there are none: use "
                        "FedAvg, or one that works on the average"
                    )
                if self._chained and (found := sorted(names & set(CHANGING))):
                    raise ConfigError(
                        f"SecureGrid: {found[0]} changes the average before it is the next base, "
                        "which clients would refuse: say server_optimizer=True (they can then "
                        "check no base)"
                    )
                return str(getattr(caller, "weighted_by_key", self._weighted_by))
            frame = frame.f_back
        return self._weighted_by

    # -- a learning round --------------------------------------------------------------------------

    def _average(self, batch: list[Message], timeout: float | None, weighing: str) -> Message:
        first = batch[0]
        kind, content = first.metadata.message_type, first.content
        form = Form.of(kind, content, self._exclude, self._weighted_by)
        for message in batch[1:]:
            if message.content is not content and message.content != content:
                raise ConfigError(
                    f"SecureGrid: node {message.metadata.dst_node_id} is sent something else than "
                    f"node {first.metadata.dst_node_id}: a sum of what was trained differently "
                    "could single somebody out"
                )
        nodes = [message.metadata.dst_node_id for message in batch]
        until = time.monotonic() + (math.inf if timeout is None else timeout)
        arrays = content.array_records[form.record]
        if self.secure_run is None:
            self._begin(form, form.flat(arrays), nodes, first.metadata.group_id, timeout)
        run, form = self.secure_run, self._form_after(form)
        assert run is not None
        self._check(form.flat(arrays))
        self._hub.group = first.metadata.group_id
        target = run.state.learning_round
        run.until = target - 1
        self._meet(nodes)
        while run.state.learning_round <= target and not run.over:
            if time.monotonic() > until:
                raise RunFailedError(
                    f"learning round {target} took longer than the strategy's timeout of "
                    f"{timeout:g} s ({run.doing})"
                )
            self._turn(run)
            if self._hub.idle and run.state.terms is not None:
                run.until = target  # everybody who answers has greeted
        if run.error:
            raise run.error
        self._hub.hold()
        if run.over:
            self._finish(run)
        assert run.state.prompt is not None
        average = form.arrays(run.state.prompt)
        metrics = MetricRecord(dict.fromkeys({weighing, self._weighted_by}, 1))
        return Message(RecordDict({form.record: average, "metrics": metrics}), reply_to=first)

    def _form_after(self, form: Form) -> Form:
        """The form that the run began with.

        Raises:
            ConfigError: a message has changed what the terms of the run say.
        """
        run = self.secure_run
        assert run is not None
        if run.over:
            raise ConfigError(
                f"SecureGrid: its {self._settings.rounds} rounds are over: give it as many rounds "
                "as the strategy has"
            )
        if changed := self._form.differs(form):
            raise ConfigError(
                f"SecureGrid: {changed}: what clients train by is in the terms, and stays; let the "
                f"app compute it from 'server-round'"
            )
        return self._form

    def _check(self, base: Prompt) -> None:
        """Refuse a base that does not follow from the sum before, unless the terms allow it."""
        run, form = self.secure_run, self._form
        assert run is not None
        expected = run.state.prompt
        assert expected is not None
        if np.array_equal(base, form.flat(form.arrays(expected))):
            return
        if self._chained:
            raise ConfigError(
                "SecureGrid: the strategy changed the average before it is the next base: say "
                "server_optimizer=True if that is meant (clients can then check no base)"
            )
        run.state.prompt = base
        run.store.save(run.state)

    def _now(self) -> float:
        return time.monotonic() + self._skew

    def _turn(self, run: Run) -> None:
        """What arrives, what time does, and what follows."""
        post(self._frames, run, hear(self._frames, run, _STEP, self._now), self._now)
        waits = run.current or run.state.terms is None or run.state.learning_round <= run.until
        if self._hub.idle and waits:  # nothing will come: do not wait for it
            due = run.current.deadline if run.current else max(run.gather_until, run.rest_until)
            self._skew += max(0.0, due - self._now()) + 0.001
        post(self._frames, run, run.tick(self._now()), self._now)
        for node, reason in self._hub.refused.items():
            self._warn(f"node {node} is not taking part: {reason}")
        self._hub.refused.clear()

    def _meet(self, nodes: list[int]) -> None:
        """Have those greet who do not take part yet, and those leave who were not asked."""
        run = self.secure_run
        assert run is not None
        there = {self._hub.nodes[name]: name for name in run.clients if name in self._hub.nodes}
        for node in set(there) - set(nodes):
            self._hub.forget(node)
            post(self._frames, run, run.gone(there[node], self._now()), self._now)
        form = msgspec.json.encode(self._form, order="deterministic")
        for node in nodes:
            if node not in there:
                self._hub.open(node, form, self._entries)

    def _finish(self, run: Run) -> None:
        """The last frames, to everybody."""
        until = time.monotonic() + self._settings.stage_seconds
        self._hub.release()
        while not self._hub.idle and time.monotonic() < until:
            hear(self._frames, run, _STEP, self._now)
        run.store.event("finished", f"learning rounds: {self._settings.rounds}")  # as every run
        self.close()

    def close(self) -> None:
        """Close the record of the run; a run that ended well has done so."""
        for made in self._closing:
            made.close()
        self._closing = ()

    # -- the beginning -----------------------------------------------------------------------------

    def _begin(
        self, form: Form, base: Prompt, nodes: list[int], group: str, timeout: float | None
    ) -> None:
        settings = self._settings
        if timeout and "training_seconds" not in self._given:
            settings = msgspec.structs.replace(settings, training_seconds=float(timeout))
        self._form = form
        self._hub = GridHub(self._grid, form.kind, group)
        if self._key:
            identity, roster = read_identity(self._key), read_roster(self._roster)
            self._entries = list[bytes]()
        else:
            identity = Identity.generate()
            roster = self._enrolled(identity, nodes)
            self._entries = [encode_fields(member) for member in roster.members]
        self._hub.roster = roster
        me = member_of(identity, roster, ("server",))
        self.folder = Path(self._dir.replace("{time}", time.strftime("%Y%m%d-%H%M%S")))
        store = Store(self.folder, settings)
        if store.load().run:
            store.close()
            raise ConfigError(f"run_dir = {str(self.folder)!r} holds a run: choose another folder")
        store.on_event.append(self._tell)
        state = RunState(tensors=form.tensors, prompt=base, start=base)
        settings = msgspec.structs.replace(
            settings,
            model_fingerprint=form.fingerprint(self._config, self._run_id).hex(),
            classes_digest=form.digest(self._config).hex(),
        )
        self.secure_run = Run(settings, roster, store, os.urandom, state, self._now(), identity)
        frames = recorder(self.folder, settings.audit, settings.audit_mb, identity, me, roster)
        self._closing = (frames, store) if frames else (store,)

        def count(peer: str, direction: str, what: str, size: int) -> None:
            store.count(state.round, peer, direction, what, size)

        counted: Hub = CountedHub(self._hub, count)
        self._frames: Hub = RecordedHub(counted, frames) if frames else counted
        LOG.info(
            "secure-fedprompt: %s over %d values under %s, %d clients on the roster; record in %s",
            settings.method, len(base), settings.protection, len(roster.clients),
            self.folder.resolve(),
        )  # fmt: skip

    def _enrolled(self, identity: Identity, nodes: list[int]) -> Roster:
        """Simulation: the roster of all nodes that answer.

        Raises:
            RunFailedError: none does.
        """
        for node in nodes:
            self._hub.ask(node, wire.ENROL)
        members = [Member.of(identity, "server", "server")]
        until = time.monotonic() + self._settings.stage_seconds
        while self._hub.pending and time.monotonic() < until:
            for node, message in self._hub.answers():
                try:
                    members.append(_enrolled(node, message))
                except LinkError as error:
                    self._warn(str(error))
            time.sleep(0.02)
        if len(members) == 1:
            raise RunFailedError("no node could be enrolled: real ones need key and roster files")
        return Roster.of(tuple(members))

    # -- words -------------------------------------------------------------------------------------

    def _tell(self, kind: str, value: Any) -> None:
        if kind == "round":
            dropped = ", ".join(f"{n} ({s})" for n, s in value["dropped"].items()) or "nobody"
            LOG.info(
                "secure-fedprompt: learning round %d/%d %s: %d clients in, %s dropped%s",
                value["learning_round"], self._settings.rounds, value["outcome"],
                len(value["cohort"]) - len(value["dropped"]), dropped,
                f"; {value['reason']}" if value["reason"] else "",
            )  # fmt: skip
        elif kind in TROUBLE:
            LOG.warning("secure-fedprompt: %s: %s", kind, value)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            LOG.warning("secure-fedprompt: %s", text)


def _enrolled(node: int, message: Message) -> Member:
    """A simulated node's entry.

    Raises:
        LinkError: it has none.
    """
    if message.has_error():
        raise LinkError(f"node {node}: {message.error.reason or message.error.code}")
    fields = wire.fields_of(message)
    if fields is None or "member" not in fields:
        raise LinkError(f"node {node} answers in the clear: its ClientApp lacks the mod 'secure'")
    return decode_fields(Member, wire.blob(fields, "member"))
