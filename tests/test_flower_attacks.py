"""A server that varies what nodes are asked, and members that lie: attacks that once worked."""

from __future__ import annotations

import json
import sys
import types

import msgspec
import numpy as np
import pytest
from flower_lab import (
    QUIET,
    START,
    adding,
    arrays_of,
    deployed,
    federate,
    frames_of,
    made_rows,
    sites_in,
)
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies

from secure_fedprompt.clients.ledger import Ledger
from secure_fedprompt.flower import SecureGrid, mod, site, wire
from secure_fedprompt.flower.form import Form, Shape
from secure_fedprompt.flower.kept import MAX_PART, Part, Step
from secure_fedprompt.host.files import read_roster
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    BudgetError,
    FieldError,
    RunFailedError,
    SignatureError,
    TooFewClientsError,
)
from secure_fedprompt.protocol.keys import Identity

FAILS = (RunFailedError, TooFewClientsError)


@pytest.fixture
def sites(tmp_path):
    return sites_in(tmp_path, 5)


def varied(grid, change):
    """Have a server change messages as it sends them."""
    push = grid.push_messages

    def pushed(messages):
        messages = list(messages)
        for message in messages:
            change(message, message.metadata.dst_node_id)
        return push(messages)

    grid.push_messages = pushed


def asks(message, kind) -> bool:
    return any(isinstance(frame, kind) for frame in frames_of(message.content))


# -- what is trained -------------------------------------------------------------------------------


def test_another_kind_of_message_makes_no_node_upload_nothing(sites, tmp_path):
    """An app's evaluate gives no arrays: zeros of all but one would leave that one's update."""
    configs, keys = sites
    grid = deployed(configs)
    for app in grid.apps.values():
        app.evaluate()(lambda message, context: Message(RecordDict(), reply_to=message))

    def change(message, node):
        if asks(message, m.Inbox) and node != 5:
            message.metadata.message_type = "evaluate"

    varied(grid, change)
    with pytest.raises(FAILS):
        federate(grid, tmp_path, **keys)
    assert not [row for row in made_rows(tmp_path) if row["outcome"] == "done"]


def test_what_was_kept_is_of_one_run_of_flower(sites, tmp_path):
    """Another run, of another app perhaps, would train something else for the same round."""
    configs, keys = sites
    grid = deployed(configs)

    def lose(node, message):
        if asks(message, m.Inbox):
            grid.contexts[node].run_id = 1 if node == 5 else 2
        return False

    grid.lose = lose
    with pytest.raises(FAILS):
        federate(grid, tmp_path, **keys)
    assert not [row for row in made_rows(tmp_path) if row["outcome"] == "done"]


def test_an_app_sees_nothing_that_a_server_varies(sites, tmp_path):
    configs, keys = sites
    seen = {}

    def look(node):
        def train(message, context):
            given = message.metadata
            seen[node] = (
                given.group_id, given.ttl, given.message_id, given.src_node_id, given.message_type,
                given.run_id, [*message.content], [*message.content["b"].items()],
            )  # fmt: skip
            return adding(node)(message, context)

        return train

    grid = deployed(configs, **{f"n{node}": look(node) for node in configs})

    def change(message, node):
        message.metadata.__dict__["_group_id"] = "skip" if node < 5 else "go"
        message.metadata.ttl = 100.0 + node
        fields = message.content.config_records[wire.RECORD]
        if fields["ask"] == wire.OPEN and node == 3:
            form = json.loads(fields["form"])
            form["configs"] = {name: dict(reversed(config.items())) for name, config
                               in reversed(form["configs"].items())}  # fmt: skip
            fields["form"] = json.dumps(form).encode()

    varied(grid, change)
    made = SecureGrid(grid, grid.context, rounds=1, run_dir=str(tmp_path / "run"), **keys)
    records = {"arrays": arrays_of(START), "b": ConfigRecord({"x": 1, "y": 2.0}),
               "a": ConfigRecord({"z": b"3"})}  # fmt: skip
    made.send_and_receive([Message(RecordDict(records), node, "train") for node in configs])
    assert len(seen) == 5
    assert len({str(value) for value in seen.values()}) == 1
    assert seen[1][0] == "1"


# -- several runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_nudge_of_the_start_leaves_nobody_out(sites, tmp_path, start):
    """Two runs from nearly the same arrays, the second without one node: the difference of their
    sums would be its update."""
    configs, keys = sites
    first = {"w": np.full((3, 2), start, np.float32)}
    federate(deployed(configs), tmp_path / "1", start=first, **keys)
    nudged = {"w": first["w"] + np.float32(0.01)}
    four = {node: configs[node] for node in (1, 2, 3, 4)}
    with pytest.raises(FAILS):
        federate(deployed(four), tmp_path / "2", start=nudged, gather_seconds=1.0, **keys)
    assert not [row for row in made_rows(tmp_path / "2") if row["outcome"] == "done"]
    federate(deployed(configs), tmp_path / "3", start=nudged, **keys)  # with everybody


def test_a_nudge_within_a_run_leaves_nobody_out(sites, tmp_path):
    """With a server optimizer every base is the server's."""
    configs, keys = sites
    for name in ("alice", "bob", "carol", "dave", "erin"):
        with (tmp_path / f"{name}.toml").open("a") as file:
            file.write('[policy]\nmethods = ["flower-optimizer"]\n')
    grid = deployed(configs)
    made = SecureGrid(grid, grid.context, rounds=3, run_dir=str(tmp_path / "run"),
                      server_optimizer=True, gather_seconds=1.0, **keys)  # fmt: skip
    for number, nodes in enumerate(((1, 2, 3, 4, 5), (1, 2, 3, 4))):
        base = {"w": np.full((3, 2), 1 + number * 5e-4, np.float32)}
        batch = [Message(RecordDict({"arrays": arrays_of(base)}), node, "train") for node in nodes]
        if number == 0:
            made.send_and_receive(batch)
            continue
        with pytest.raises(FAILS):
            made.send_and_receive(batch)
    assert [row["outcome"] for row in made_rows(tmp_path)].count("done") == 1


def test_other_settings_need_the_operators_word(sites, tmp_path, caplog):
    """Runs that differ in where an app cuts off would tell on which side a private number lies."""
    configs, keys = sites

    def run(folder, lr):
        grid = deployed(configs)
        made = SecureGrid(grid, grid.context, rounds=1, run_dir=str(folder), gather_seconds=1.0,
                          **keys)  # fmt: skip
        strategies.FedAvg(**QUIET).start(
            made, arrays_of(START), 1, train_config=ConfigRecord({"cap": lr})
        )

    run(tmp_path / "1", 0.5)
    run(tmp_path / "2", 0.5)
    caplog.clear()
    with pytest.raises(FAILS):
        run(tmp_path / "3", 0.4)


def test_the_word_is_asked_by_name_and_taken(sites, tmp_path):
    configs, keys = sites
    federate(deployed(configs), tmp_path / "1", **keys)
    said = []
    error = mod.LOG.error
    mod.LOG.error = mod.LOG.warning = lambda text, *args, **kw: said.append(text % args)
    try:
        with pytest.raises(FAILS):
            federate(deployed(configs), tmp_path / "2", clip=0.5, gather_seconds=1.0, **keys)
    finally:
        mod.LOG.error = error
        del mod.LOG.warning
    assert not [row for row in made_rows(tmp_path / "2") if row["outcome"] == "done"]


# -- failures and timing ---------------------------------------------------------------------------


def weighing(tmp_path):
    """Sites that let themselves be weighed."""
    for path in tmp_path.glob("*.toml"):
        if "state_dir" in path.read_text():
            with path.open("a") as file:
                file.write("[policy]\nweights = []\n")


def test_a_failure_keeps_its_weight(sites, tmp_path):
    """With weights a sum that falls by one client's count would show who failed, and the count."""
    configs, keys = sites
    weighing(tmp_path)
    calls = []

    def second_time(message, context):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError
        return adding(3)(message, context)

    sums = []
    grid = deployed(configs, n3=second_time)
    made = SecureGrid(grid, grid.context, rounds=2, run_dir=str(tmp_path / "run"),
                      weights="samples", max_weight=256, **keys)  # fmt: skip
    tell = SecureGrid._tell

    def told(self, kind, value):
        if kind == "round":
            sums.append(value["metrics"]["weight"])
        tell(self, kind, value)

    made._tell = types.MethodType(told, made)
    strategies.FedAvg(**QUIET).start(made, arrays_of(START), 2)
    assert sums == [150.0, 150.0]


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), 0.0, -1.0, 1e12])
def test_a_weight_that_is_none_is_a_failure_like_others(sites, tmp_path, weight):
    configs, keys = sites
    weighing(tmp_path)

    def odd(message, context):
        reply = adding(2)(message, context)
        reply.content["metrics"] = MetricRecord({"num-examples": weight})
        return reply

    arrays, _ = federate(
        deployed(configs, n2=odd), tmp_path, weights="bucket", max_weight=256, **keys
    )
    assert arrays["w"].shape == (3, 2)
    (row,) = made_rows(tmp_path)
    assert row["dropped"] == {}


def test_a_failure_takes_as_long_as_training_ever_took(sites, tmp_path, monkeypatch):
    """Also in the next run, and after a new greeting."""
    configs, keys = sites
    slept = []
    monkeypatch.setattr(mod.time, "sleep", slept.append)
    keep = site.DiskSite.keep

    def slow(self, kept):
        kept.seconds = 1000.0
        keep(self, kept)

    with monkeypatch.context() as patch:
        patch.setattr(site.DiskSite, "keep", slow)
        federate(deployed(configs), tmp_path / "1", **keys)

    def broken(message, context):
        raise SystemExit(3)

    assert max(slept) < 900
    federate(deployed(configs, n4=broken), tmp_path / "2", **keys)
    assert max(slept) > 900


def test_a_site_holds_its_uploads(sites, tmp_path, monkeypatch):
    configs, keys = sites
    with (tmp_path / "bob.toml").open("a") as file:
        file.write("hold_seconds = 50.0\n")
    slept = []
    monkeypatch.setattr(mod.time, "sleep", slept.append)
    federate(deployed(configs), tmp_path, upload_after=20.0, **keys)
    holds = sorted(seconds for seconds in slept if seconds > 5)
    assert all(10 < seconds <= 20 for seconds in holds[:4])  # less what training took
    assert [40 < seconds <= 50 for seconds in holds[4:]] == [True]


def test_a_spent_budget_looks_the_same_when_it_is_played_again(sites, tmp_path, monkeypatch):
    configs, keys = sites

    class Spent(Ledger):
        def release(self, upload, limit, delta):
            raise BudgetError("spent")

    monkeypatch.setattr(
        site, "Ledger", lambda path=None: (Spent if "carol" in str(path) else Ledger)(path)
    )
    grid = deployed(configs)
    arrays, _ = federate(grid, tmp_path, rounds=2, **keys)
    rows = made_rows(tmp_path)
    assert not [reply for _, reply in grid.got if reply.has_error()]
    assert [row["dropped"] for row in rows] == [{}, {}]
    assert arrays["w"][0, 0] == pytest.approx(2 * 0.125 * (1 + 2 + 4 + 5) / 5)


def test_what_goes_wrong_on_a_node_is_told_to_its_operator_only(sites, tmp_path, monkeypatch):
    configs, keys = sites
    grid = deployed(configs)

    def wrong(self, learning_round):
        raise RuntimeError("private words")

    monkeypatch.setattr(Form, "records", wrong)
    arrays, _ = federate(grid, tmp_path, **keys)
    assert not arrays["w"].any()
    monkeypatch.setattr(mod, "_form", lambda data: 1 / 0)
    with pytest.raises(FAILS):
        federate(grid, tmp_path / "again", gather_seconds=1.0, **keys)
    told = [reply.error.reason for _, reply in grid.got if reply.has_error()]
    assert told
    assert set(told) == {"this node is not ready; its own log says why"}


# -- what is kept ----------------------------------------------------------------------------------


def test_nothing_that_opens_an_upload_outlives_its_round(sites, tmp_path, monkeypatch):
    configs, keys = sites
    parts = []
    keep = site.DiskSite.keep

    def look(self, kept):
        parts.append(kept.tape and kept.tape.round)
        keep(self, kept)

    monkeypatch.setattr(site.DiskSite, "keep", look)
    federate(deployed(configs), tmp_path, rounds=2, **keys)
    between = [part for part in parts if part is not None and not part.steps]
    assert between
    assert all(part.drawn == b"" and part.spent == [] for part in between)
    for name in ("alice", "bob", "carol", "dave", "erin"):
        data = (tmp_path / f"state-{name}" / "flower.tape").read_bytes()
        assert msgspec.msgpack.decode(data, type=site.Kept).tape is None


def test_a_run_that_is_over_trains_no_more(sites, tmp_path):
    configs, keys = sites
    calls = []

    def counting(message, context):
        calls.append(1)
        return adding(1)(message, context)

    grid = deployed(configs, n1=counting)
    federate(grid, tmp_path, **keys)
    last = next(content for node, content in reversed(grid.sent) if node == 1)
    plans = [content for node, content in grid.sent if node == 1 and asks(
        Message(content, 1, "train"), m.Plan)]  # fmt: skip
    for content in (last, *plans):
        (reply,) = grid.send_and_receive([Message(content, 1, "train")])
        assert reply.has_error()
    assert len(calls) == 1


def test_a_round_holds_no_more_than_it_can_have():
    part = Part(0)
    part.add(Step("frame", b"x"))

    class Huge(bytes):
        def __len__(self):
            return MAX_PART

    with pytest.raises(FieldError, match="more than a round can have"):
        part.add(Step("frame", Huge()))
    assert len(part.steps) == 1


def test_a_node_that_is_called_back_takes_part_again(sites, tmp_path):
    """It missed a round while it was there; between two calls it must not forget that it left."""
    configs, keys = sites
    grid = deployed(configs)
    made = SecureGrid(grid, grid.context, rounds=3, run_dir=str(tmp_path / "run"), **keys)
    average = arrays_of(START)
    for number in range(3):
        (reply,) = made.send_and_receive(
            [Message(RecordDict({"arrays": average}), node, "train") for node in configs]
        )
        average = reply.content["arrays"]
        made.secure_run.benched = {"bob"} if number == 0 else set()
    everybody = ["alice", "bob", "carol", "dave", "erin"]
    rows = made_rows(tmp_path)
    assert [row["cohort"] for row in rows] == [
        everybody,
        ["alice", "carol", "dave", "erin"],
        everybody,
    ]
    assert [row["dropped"] for row in rows] == [{}, {}, {}]


# -- who is who ------------------------------------------------------------------------------------


def test_a_process_that_uses_ray_is_no_simulation(monkeypatch, sites):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
    assert not site.simulated()
    configs, _ = sites
    grid = deployed({node: {} for node in configs})
    content = wire.record(ask=wire.ENROL, frames=[])
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert reply.has_error()
    worker = types.ModuleType("flwr.simulation.ray_transport.ray_actor")
    exec("def run(f):\n    return f()", worker.__dict__)
    assert worker.run(site.simulated)


def test_the_environment_may_name_the_client_file(sites, tmp_path, monkeypatch):
    configs, keys = sites
    alice = configs.pop(1)
    grid = deployed({1: {}, **configs})
    monkeypatch.setenv(site.ENV, alice[site.KEY])
    federate(grid, tmp_path, **keys)
    (row,) = made_rows(tmp_path)
    assert "alice" in row["cohort"]


@pytest.mark.parametrize("odd", [1 << 38, "text", [b"x"], b"short", 1.5])
def test_a_member_that_answers_nonsense_spoils_nothing(sites, tmp_path, odd):
    configs, keys = sites
    grid = deployed(configs)

    def after(node, reply):
        if node == 5 and reply.has_content() and "signature" in reply.content[wire.RECORD]:
            reply.content[wire.RECORD]["signature"] = odd
        return reply

    grid.after = after
    federate(grid, tmp_path, **keys)
    (row,) = made_rows(tmp_path)
    assert row["cohort"] == ["alice", "bob", "carol", "dave"]


def test_a_proof_for_one_federation_is_none_for_another(sites, tmp_path):
    _, keys = sites
    roster, identity = read_roster(keys["roster"]), Identity.generate()
    signature = wire.bind(identity, bytes(32), 7, roster.digest)
    wire.check_bound(identity.public(), bytes(32), 7, roster.digest, signature, "x")
    for challenge, node, digest in (
        (bytes(32), 8, roster.digest), (bytes(31) + b"1", 7, roster.digest), (bytes(32), 7, bytes(32)),
    ):  # fmt: skip
        with pytest.raises(SignatureError):
            wire.check_bound(identity.public(), challenge, node, digest, signature, "x")


def form_with(**changes) -> Form:
    content = RecordDict({"arrays": arrays_of(START)})
    form = Form.of("train", content, (), "num-examples")
    values = {name: getattr(form, name) for name in form.__struct_fields__}
    return Form(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [{"averaged": (Shape("w", "<U1000", (3,)), Shape("b", "float32", (4,)))},
     {"averaged": (Shape("w", "float32", (-3, -2)), Shape("b", "float32", (4,)))},
     {"averaged": (Shape("w", "float32", (1 << 40,)), Shape("b", "float32", (4,)))},
     {"averaged": (Shape("w", "float32", (1,)),)}, {"order": ("w", "b", "b")},
     {"averaged": (Shape("w", "float32", (1,)), Shape("w", "float32", (1,)))},
     {"averaged": (Shape("w", "longdouble", (1,)), Shape("b", "float32", (4,)))}],
)  # fmt: skip
def test_a_form_that_is_none_is_refused(changes):
    form_with().check()
    with pytest.raises(FieldError, match="form"):
        form_with(**changes).check()
