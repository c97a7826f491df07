"""``secure``: the ClientApp's half. Nothing that an app replies leaves a node but under protection.

    app = ClientApp(mods=[secure])

Frames go to the session; when it is to train, the app's own ``train`` is called with the arrays of
the round, once, and what it changed is uploaded masked. Metrics, configs and everything else of its
reply stay where they are. Messages that are not frames are refused: what an app would answer to
them, losses and image counts, would be in the clear.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np
from flwr.app import Context, Error, Message, RecordDict

from secure_fedprompt.flower import site as sites
from secure_fedprompt.flower import wire
from secure_fedprompt.flower.form import Form
from secure_fedprompt.flower.kept import TapeError
from secure_fedprompt.flower.player import AppWorkload, Player
from secure_fedprompt.flower.site import Kept, Site
from secure_fedprompt.host.recorded import RecordedLink
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import (
    FieldError,
    SecureFedPromptError,
    SumError,
    UpdateError,
)
from secure_fedprompt.protocol.transport import Frame, Link

App = Callable[[Message, Context], Message]
REFUSED = 1000  # code of our errors, beyond Flower's own
LOG = logging.getLogger("flwr")


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
        return _refuse(message, "this node is not ready; its own log says why")


def _refuse(message: Message, words: str) -> Message:
    return Message(Error(REFUSED, words), reply_to=message)


def _answer(message: Message, context: Context, call_next: App, site: Site) -> Message:
    fields = wire.fields_of(message)
    assert fields is not None
    link = CallLink(wire.blobs(fields, "frames"))
    watched: Link = RecordedLink(link, site.recorder) if site.recorder else link
    extra: dict[str, object] = {}
    if fields.get("ask") == wire.OPEN:
        form = _form(wire.blob(fields, "form"))
        player = _player(site, context, form, None)
        challenge = wire.blob(fields, "challenge")
        extra = {
            "name": site.member.name,
            "signature": wire.bind(site.member.identity, challenge, context.node_id),
        }
        kept = Kept(form, player.tape)
        watched.send(Frame.of(player.hello))
    else:
        kept = site.load()
        player = _player(site, context, kept.form, kept)
    session = player.session
    try:
        while (frame := watched.receive(0.0)) is not None:
            for reply in player.hear(bytes(frame.data)):
                watched.send(Frame.read(reply))
        if session.work is not None:
            for reply in _train(message, context, call_next, player, kept):
                watched.send(Frame.read(reply))
    except SecureFedPromptError as error:
        LOG.error("secure-fedprompt: %s left the run: %s", site.member.name, error)
        if isinstance(error, SumError):
            LOG.error("secure-fedprompt: the server sent what is not the sum of the uploads")
        watched.send(Frame.of(session.leave(error)))
    if session.over and session.verified:
        LOG.info("secure-fedprompt: the run is over; its arrays follow from sums that were checked")
    kept.tape = player.tape
    site.keep(kept)
    return Message(wire.record(frames=link.sent, **extra), reply_to=message)


def _form(data: bytes) -> Form:
    try:
        return msgspec.json.decode(data, type=Form)
    except msgspec.MsgspecError as error:
        raise FieldError(f"form of the app is not understood: {error}") from None


def _player(site: Site, context: Context, form: Form, kept: Kept | None) -> Player:
    workload = AppWorkload(form, form.fingerprint(context.run_config))
    return Player(site.member, workload, site.shelf, site.ledger, kept.tape if kept else None)


def _train(
    message: Message, context: Context, call_next: App, player: Player, kept: Kept
) -> list[bytes]:
    """Have the app train, and upload what it changed. If it fails nobody is told, since the server
    chose what was trained: zeros leave, when training usually ends."""
    work, form = player.session.work, kept.form
    assert work is not None
    records = {form.record: form.arrays(work.base), **form.records(work.plan.learning_round)}
    message.content = RecordDict(records)
    began = time.monotonic()
    try:
        reply = call_next(message, context)
        delta, weight = _change(form, reply, work.base)
    except Exception as error:
        LOG.error(
            "secure-fedprompt: training failed (%s: %s); a zero update is sent in its place, and "
            "the server is not told", type(error).__name__, error,
        )  # fmt: skip
        time.sleep(max(0.0, kept.seconds - (time.monotonic() - began)))
        return player.failed()
    kept.seconds = max(kept.seconds, time.monotonic() - began)
    if cut := int(np.count_nonzero(np.abs(delta) > work.plan.clip)):
        LOG.warning(
            "secure-fedprompt: %d of %d values of the update were clipped to %g",
            cut, len(delta), work.plan.clip,
        )  # fmt: skip
    return player.trained(delta, 1.0 if work.plan.uniform else weight)


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
    if not weight >= 1.0:
        raise UpdateError(f"{form.weighted_by} = {weight}: at least 1")
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
