"""``secure``: the ClientApp's half. Nothing that an app replies leaves a node but under protection.

    app = ClientApp(mods=[secure])

Frames go to the session; when it is to train, the app's own ``train`` is called with the arrays of
the round, once, and what it changed is uploaded masked. Metrics, configs and everything else of its
reply stay where they are. Messages that are not frames are refused: what an app would answer to
them, losses and image counts, would be in the clear.

What an app is called with does not depend on what the server says to this node alone: arrays,
records, kind of message and configs are those of the terms, everything else is this node's own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict

from secure_fedprompt.flower import site as sites
from secure_fedprompt.flower import wire
from secure_fedprompt.flower.form import Form
from secure_fedprompt.flower.kept import TapeError
from secure_fedprompt.flower.player import AppWorkload, Player
from secure_fedprompt.flower.site import Kept, Site
from secure_fedprompt.host.recorded import RecordedLink
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import (
    FieldError,
    MismatchError,
    SecureFedPromptError,
    SumError,
    UpdateError,
)
from secure_fedprompt.protocol.transport import Frame, Link

App = Callable[[Message, Context], Message]
TTL = 43_200.0  # seconds that a message lives, as Flower gives it
REFUSED = 1000  # code of our errors, beyond Flower's own
LOG = logging.getLogger("flwr")
_MAX_WEIGHT = 1e9


def secure(message: Message, context: Context, call_next: App) -> Message:
    """A mod of Flower's ClientApp; see the module. It has to be the first of an app's mods."""
    try:
        fields = wire.fields_of(message)
        if fields is None:
            kind = message.metadata.message_type
            return _refuse(
                message, f"a {kind!r} message in the clear: this node answers SecureGrid only"
            )
        if fields.get("ask") == wire.ENROL and sites.simulated():
            return Message(wire.record(member=sites.enrol(context)), reply_to=message)
        if fields.get("ask") == wire.OPEN and fields.get("members") and sites.simulated():
            sites.believe(context, wire.blobs(fields, "members", 1 << 16))
        with sites.open_site(context) as site:
            return _answer(message, context, call_next, site)
    except TapeError as error:
        LOG.warning("secure-fedprompt: %s; this node has to be met anew", error)
        return _refuse(message, "this node lost what it kept of the round, and has to be met anew")
    except SecureFedPromptError as error:
        LOG.error("secure-fedprompt: %s: %s", type(error).__name__, error)
    except Exception:  # whatever it is about: Flower would send its words to the server
        LOG.exception("secure-fedprompt: this node failed")
    return _refuse(message, "this node is not ready; its own log says why")


def _refuse(message: Message, words: str) -> Message:
    return Message(Error(REFUSED, words), reply_to=message)


def _answer(message: Message, context: Context, call_next: App, site: Site) -> Message:
    fields = wire.fields_of(message)
    assert fields is not None
    link = CallLink(wire.blobs(fields, "frames"))
    watched: Link = RecordedLink(link, site.recorder) if site.recorder else link
    extra: dict[str, object] = {}
    before: Kept | None = None
    with contextlib.suppress(TapeError):
        before = site.load()
    if fields.get("ask") == wire.OPEN:
        kept, player = _open(fields, message, context, site, before)
        challenge, member = wire.blob(fields, "challenge"), site.member
        signature = wire.bind(member.identity, challenge, context.node_id, member.roster.digest)
        extra = {"name": member.name, "signature": signature}
        watched.send(Frame.of(player.hello))
    else:
        if before is None or before.tape is None:
            raise TapeError("nothing usable was kept of this run")
        kept = before
        _check_kind(message, kept.form)
        player = _player(site, context, kept)
    over = _hear(player, watched, kept, context, call_next, site)
    kept.tape = None if over else player.tape  # what could open uploads is not kept
    site.keep(kept)
    return Message(wire.record(frames=link.sent, **extra), reply_to=message)


def _open(
    fields: ConfigRecord, message: Message, context: Context, site: Site, before: Kept | None
) -> tuple[Kept, Player]:
    """Begin anew, whatever was under way; the journal knows what may still be done."""
    form = _form(wire.blob(fields, "form"))
    _check_kind(message, form)
    fresh = Kept(form, None)
    if before is not None:  # or haste would show that training failed the last time
        fresh.seconds, fresh.weight = before.seconds, before.weight
    return fresh, _player(site, context, fresh)


def _hear(
    player: Player, link: Link, kept: Kept, context: Context, call_next: App, site: Site
) -> bool:
    """Take all frames, and train where that is asked; whether the run is over for this node."""
    session = player.session
    try:
        while (frame := link.receive(0.0)) is not None:
            if isinstance(frame.message, m.Plan):
                kept.planned = time.time()
            for reply in player.hear(bytes(frame.data)):
                link.send(Frame.read(reply))
        if session.work is not None:
            for reply in _train(context, call_next, player, kept, site.hold_seconds):
                link.send(Frame.read(reply))
    except SecureFedPromptError as error:
        LOG.error("secure-fedprompt: %s left the run: %s", site.member.name, error)
        if isinstance(error, SumError):
            LOG.error("secure-fedprompt: the server sent what is not the sum of the uploads")
        link.send(Frame.of(session.leave(error)))
        return True
    if session.over and session.verified:
        LOG.info("secure-fedprompt: the run is over; its arrays follow from sums that were checked")
    return session.over


def _check_kind(message: Message, form: Form) -> None:
    """An app answers another kind of message with something else: refuse what the terms do not say.

    Raises:
        MismatchError
    """
    if (kind := message.metadata.message_type) != form.kind:
        raise MismatchError(f"a {kind!r} message in a run of {form.kind!r} messages")


def _form(data: bytes) -> Form:
    try:
        form = msgspec.json.decode(data, type=Form)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FieldError(f"form of the app is not understood: {error}") from None
    form.check()
    return form


def _player(site: Site, context: Context, kept: Kept) -> Player:
    form, given = kept.form, context.run_config
    workload = AppWorkload(
        form, form.fingerprint(given, context.run_id), form.digest(given), kept.weight
    )
    return Player(site.member, workload, site.shelf, site.ledger, kept.tape)


def _asked(form: Form, base: Prompt, learning_round: int, context: Context) -> Message:
    """The message that an app would have been sent, with nothing in it that the server varies."""
    content = RecordDict({form.record: form.arrays(base), **form.records(learning_round)})
    metadata = Metadata(
        run_id=context.run_id, message_id=f"round-{learning_round}", src_node_id=1,
        dst_node_id=context.node_id, reply_to_message_id="", group_id=str(learning_round),
        created_at=time.time(), ttl=TTL, message_type=form.kind,
    )  # fmt: skip
    return Message(content, metadata=metadata)


def _train(
    context: Context, call_next: App, player: Player, kept: Kept, hold_seconds: float
) -> list[bytes]:
    """Have the app train, and upload what it changed. If it fails nobody is told, since the server
    chose what was trained: zeros leave, when training usually ends."""
    session, form = player.session, kept.form
    work, terms = session.work, session.terms
    assert work is not None
    assert terms is not None
    began = time.monotonic()
    try:
        asked = _asked(form, work.base, work.plan.learning_round, context)
        delta, weight = _change(form, call_next(asked, context), work.base)
    except (Exception, SystemExit) as error:
        LOG.error(
            "secure-fedprompt: training failed (%s: %s); a zero update is sent in its place, and "
            "the server is not told", type(error).__name__, error,
        )  # fmt: skip
        time.sleep(max(0.0, kept.seconds - (time.monotonic() - began)))
        frames = player.failed()
    else:
        kept.seconds = max(kept.seconds, time.monotonic() - began)
        kept.weight = weight
        if cut := int(np.count_nonzero(np.abs(delta) > work.plan.clip)):
            LOG.warning(
                "secure-fedprompt: %d of %d values were beyond clip = %g: the update was scaled",
                cut, len(delta), work.plan.clip,
            )  # fmt: skip
        frames = player.trained(delta, 1.0 if work.plan.uniform else weight)
    hold = max(hold_seconds, terms.upload_after)
    time.sleep(min(_left(hold, kept.planned), terms.training_seconds))
    return frames


def _left(hold: float, planned: float) -> float:
    """Seconds until an upload may leave; the clock of a plan that another process perhaps had can
    have jumped since."""
    return min(max(0.0, hold - (time.time() - planned)), hold)


def _change(form: Form, reply: Message, base: Prompt) -> tuple[Prompt, float]:
    """What an app's reply has changed, and its weight.

    Raises:
        UpdateError: it holds no such arrays.
    """
    if reply.has_error():
        raise UpdateError(f"the app replied with an error: {reply.error.reason}")
    arrays = list(reply.content.array_records.values())
    if len(arrays) != 1:
        raise UpdateError(f"the app replied with {len(arrays)} array records, one is averaged")
    weight = 1.0
    for metrics in reply.content.metric_records.values():
        weight = float(np.asarray(metrics.get(form.weighted_by, weight)).sum())
    if not 1.0 <= weight <= _MAX_WEIGHT:
        raise UpdateError(f"{form.weighted_by} = {weight}: a number from 1 to {_MAX_WEIGHT:g}")
    return form.flat(arrays[0]) - base, weight


class CallLink:
    """One call's frames, as a ``transport.Link``."""

    connections = 1

    def __init__(self, frames: list[bytes]) -> None:
        self._come, self.sent = deque(frames), list[bytes]()

    def send(self, frame: Frame) -> None:
        self.sent.append(bytes(frame.data))

    def receive(self, timeout: float) -> Frame | None:
        return Frame.read(self._come.popleft()) if self._come else None
