"""Apps of Flower under masks: averages, dropouts, refusals, and what leaves a node."""

from __future__ import annotations

import json
import struct

import msgspec
import numpy as np
import pytest
from flower_lab import (
    QUIET,
    START,
    LabGrid,
    adding,
    app_of,
    arrays_of,
    deployed,
    federate,
    frames_of,
    lab,
    made_rows,
    sites_in,
)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as strategies
from hypothesis import given
from hypothesis import strategies as st

from secure_fedprompt.audit.command import main as audit
from secure_fedprompt.flower import SecureGrid, mod, site, wire
from secure_fedprompt.flower.form import Form
from secure_fedprompt.flower.kept import MemoryShelf
from secure_fedprompt.host.files import read_roster
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError, TooFewClientsError
from secure_fedprompt.server.run import Run


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setattr(site, "simulated", lambda: True)


@pytest.fixture
def sites(tmp_path):
    return sites_in(tmp_path)


# -- averages --------------------------------------------------------------------------------------


def test_an_unmodified_strategy_gets_the_average(simulated, tmp_path):
    arrays, made = federate(lab(), tmp_path, rounds=3)
    expected = 3 * 0.125 * (1 + 2 + 3 + 4) / 4
    assert np.array_equal(arrays["w"], np.full((3, 2), expected, np.float32))
    assert np.array_equal(arrays["b"], np.full(4, 1 + expected, np.float16))
    assert arrays["b"].dtype == np.float16
    assert made.secure_run.state.learning_round == 4


def test_the_sum_is_that_of_the_encoded_uploads_bit_by_bit(simulated, tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    moves = {node: rng.normal(0, 0.1, 10).astype(np.float32) for node in range(1, 6)}

    def moving(node):
        def train(message, context):
            (record,) = message.content.array_records.values()
            moved = arrays_of({"x": record["x"].numpy() + moves[node]})
            return Message(RecordDict({"arrays": moved}), reply_to=message)

        return train

    grid = lab(5, **{f"n{node}": moving(node) for node in moves})
    opened = []
    apply = Run._apply
    monkeypatch.setattr(Run, "_apply", lambda run, done: (opened.append(done), apply(run, done)))
    vectors = []
    put = MemoryShelf.put

    def keep(shelf, name, data):
        if name.startswith("vector-") and data is not None:
            vectors.append(np.frombuffer(data, "<u4"))
        put(shelf, name, data)

    monkeypatch.setattr(MemoryShelf, "put", keep)
    arrays, _ = federate(grid, tmp_path, start={"x": np.zeros(10, np.float32)})
    (done,) = opened
    total = np.sum(vectors, axis=0, dtype=np.uint32)
    assert len(vectors) == 5
    assert np.array_equal(fixedpoint.to_integers(done.plan.layout, total), done.integers)
    step = 2.0 ** -done.plan.layout[0].frac
    assert np.abs(arrays["x"] - np.mean(list(moves.values()), axis=0)).max() <= step


def test_weights_are_the_apps_own_counts(simulated, tmp_path):
    arrays, _ = federate(lab(), tmp_path, weights="samples", max_weight=256)
    weights = np.array([10, 20, 30, 40])
    expected = (weights * 0.125 * np.arange(1, 5)).sum() / weights.sum()
    assert np.allclose(arrays["w"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("lost", "within"),
    [(m.Terms, False), (m.Plan, False), (m.Adverts, False), (m.Inbox, False),
     (m.SurvivorList, True), (m.UnmaskRequest, True)],
)  # fmt: skip
def test_a_node_that_is_lost_at_any_stage_costs_the_round_nothing(
    simulated, tmp_path, lost, within
):
    grid, gone = lab(5), set()

    def lose(node, message):
        kinds = [type(frame) for frame in frames_of(message.content)]
        if node == 5 and lost in kinds:
            gone.add(node)
        return node in gone

    grid.lose = lose
    arrays, _ = federate(grid, tmp_path)
    assert gone == {5}
    assert arrays["w"][0, 0] == pytest.approx(0.125 * (3.0 if within else 2.5))


def test_a_node_that_was_lost_takes_part_in_the_next_round(simulated, tmp_path):
    grid = lab(5)
    grid.lose = lambda node, message: (
        node == 2 and grid.sent[-1][0] == 2 and any(
            isinstance(frame, m.Inbox) and frame.round == 1 for frame in frames_of(message.content)
        )
    )  # fmt: skip
    arrays, _ = federate(grid, tmp_path, rounds=2)
    expected = 0.125 * ((1 + 3 + 4 + 5) / 4 + 3)
    assert arrays["w"][0, 0] == pytest.approx(expected)


def test_nodes_that_a_strategy_does_not_sample_wait(simulated, tmp_path):
    grid = lab(6)
    seen = []
    sample = strategies.FedAvg.configure_train

    class Five(strategies.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            batch = list(sample(self, server_round, arrays, config, grid))
            left_out = 1 + server_round
            seen.append(left_out)
            return [b for b in batch if server_round == 1 or b.metadata.dst_node_id != left_out]

    arrays, _ = federate(grid, tmp_path, rounds=3, strategy=Five(**QUIET))
    means = [3.5] + [(21 - left) / 5 for left in seen[1:]]
    assert arrays["w"][0, 0] == pytest.approx(0.125 * sum(means))


def test_too_few_nodes_end_the_run_without_waiting(simulated, tmp_path):
    grid = lab(4)
    grid.lose = lambda node, message: (
        node < 3 and any(isinstance(f, m.Adverts) for f in frames_of(message.content))
    )
    with pytest.raises((RunFailedError, TooFewClientsError), match="of at least 3 clients|aborted"):
        federate(grid, tmp_path)


# -- what leaves a node ----------------------------------------------------------------------------


def test_nothing_of_a_reply_leaves_but_frames(simulated, tmp_path):
    grid = lab()
    federate(grid, tmp_path, rounds=2)
    uploads = 0
    for node, reply in grid.got:
        assert set(reply.content) == {wire.RECORD}
        assert set(reply.content[wire.RECORD]) <= {
            "version", "frames", "name", "signature", "member",
        }  # fmt: skip
        data = b"".join(v for value in reply.content[wire.RECORD].values()
                        for v in (value if isinstance(value, list) else [value])
                        if isinstance(v, bytes))  # fmt: skip
        loss, moved = 1234.5 + node, np.full(6, 0.125 * node, np.float32)
        for private in (struct.pack("<d", loss), struct.pack("<f", loss), moved.tobytes()):
            assert private not in data
        uploads += sum(isinstance(f, m.MaskedUpload) for f in frames_of(reply.content))
    assert uploads == 8


def test_training_runs_once_a_round_with_the_strategys_config(simulated, tmp_path):
    calls = []

    def train(message, context):
        calls.append((message.content["config"]["server-round"], message.content["config"]["lr"]))
        return adding(1)(message, context)

    grid = lab(4, n1=train)
    made = SecureGrid(grid, grid.context, rounds=2, run_dir=str(tmp_path / "run"))
    strategies.FedAvg(**QUIET).start(
        made, arrays_of(START), 2, train_config=ConfigRecord({"lr": 0.5, "blob": b"\x01"})
    )
    assert calls == [(1, 0.5), (2, 0.5)]


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.other"])
def test_a_node_answers_nothing_in_the_clear(simulated, kind):
    called = []
    app = ClientApp(mods=[mod.secure])
    for made in (app.train(), app.evaluate(), app.query(), app.train("other")):
        made(lambda message, context: called.append(1))
    grid = LabGrid({1: app})
    content = RecordDict({"arrays": arrays_of(START)})
    (reply,) = grid.send_and_receive([Message(content, 1, kind)])
    assert not called
    assert reply.error.code == mod.REFUSED
    assert "SecureGrid" in reply.error.reason


def test_evaluate_batches_are_not_sent(simulated, tmp_path, caplog):
    grid = lab()
    federate(grid, tmp_path, strategy=strategies.FedAvg())
    before = len(grid.sent)
    made = SecureGrid(grid, grid.context, rounds=1, run_dir=str(tmp_path / "other"))
    message = Message(RecordDict({"arrays": arrays_of(START)}), 1, "evaluate")
    assert made.send_and_receive([message]) == []
    assert len(grid.sent) == before
    with pytest.raises(ConfigError, match="only send_and_receive"):
        made.push_messages([message])


def test_training_that_fails_looks_like_any_other(simulated, tmp_path):
    def broken(message, context):
        raise RuntimeError("a secret of node 2")

    def nan(message, context):
        content = RecordDict({"arrays": arrays_of({
            "w": np.full((3, 2), np.nan, np.float32), "b": START["b"]})})  # fmt: skip
        return Message(content, reply_to=message)

    grid = lab(4, n2=broken, n3=nan)
    arrays, _ = federate(grid, tmp_path)
    assert arrays["w"][0, 0] == pytest.approx(0.125 * (1 + 4) / 4)
    sizes = {
        node: [len(str(type(f))) for f in frames_of(reply.content)] for node, reply in grid.got
    }
    assert sizes[1] == sizes[2] == sizes[3]
    assert not any(b"secret" in bytes(data) for _, reply in grid.got
                   for data in reply.content[wire.RECORD].get("frames", []))  # fmt: skip


def test_an_app_without_the_mod_is_not_part_of_anything(simulated, tmp_path):
    plain = ClientApp()
    plain.train()(adding(4))
    grid = lab(5)
    grid.apps[4] = plain
    arrays, _ = federate(grid, tmp_path)
    assert arrays["w"][0, 0] == pytest.approx(0.125 * (1 + 2 + 3 + 5) / 4)
    assert not any("arrays" in reply.content for node, reply in grid.got if reply.has_content()
                   and node != 4)  # fmt: skip


# -- a server that varies what clients train by ----------------------------------------------------


def test_a_server_cannot_give_all_but_one_another_config(simulated, tmp_path):
    """Were it possible, their updates would be nothing, and the sum one client's update."""
    grid = lab(5)
    push = grid.push_messages

    def vary(messages):
        messages = list(messages)
        for message in messages:
            fields = message.content.config_records[wire.RECORD]
            if fields["ask"] == wire.OPEN and message.metadata.dst_node_id != 5:
                form = json.loads(fields["form"])
                form["configs"]["config"]["lr"] = 0.0
                fields["form"] = json.dumps(form).encode()
        return push(messages)

    grid.push_messages = vary
    made = SecureGrid(grid, grid.context, rounds=1, run_dir=str(tmp_path / "run"))
    with pytest.raises(TooFewClientsError):
        strategies.FedAvg(**QUIET).start(
            made, arrays_of(START), 1, train_config=ConfigRecord({"lr": 0.5})
        )
    assert made_rows(tmp_path) == []


def test_nor_if_it_says_so_in_the_terms(simulated, tmp_path):
    """It agrees with the four, and leaves the fifth out of what it can sum."""
    grid = lab(5)
    grid.contexts[5].run_config["lr"] = 0.5
    federate(grid, tmp_path)
    (row,) = made_rows(tmp_path)
    assert row["cohort"] == ["node-1", "node-2", "node-3", "node-4"]


def batch_of(grid, **records):
    return [Message(RecordDict(records), node, "train") for node in grid.get_node_ids()]


def test_a_batch_that_is_not_the_same_for_all_is_refused(simulated, tmp_path):
    grid = lab()
    made = SecureGrid(grid, grid.context, rounds=1, run_dir=str(tmp_path / "run"))
    batch = batch_of(grid, arrays=arrays_of(START), config=ConfigRecord({"lr": 0.1}))
    batch[2].content = RecordDict({"arrays": arrays_of(START), "config": ConfigRecord({"lr": 0.2})})
    with pytest.raises(ConfigError, match="node 3 is sent something else"):
        made.send_and_receive(batch)
    assert not grid.sent


def test_what_clients_train_by_stays_as_it_was(simulated, tmp_path):
    grid = lab()
    made = SecureGrid(grid, grid.context, rounds=3, run_dir=str(tmp_path / "run"))
    config = ConfigRecord({"lr": 0.1, "server-round": 1})
    (reply,) = made.send_and_receive(batch_of(grid, arrays=arrays_of(START), config=config))
    average = reply.content["arrays"]
    config = ConfigRecord({"lr": 0.1, "server-round": 2})
    (reply,) = made.send_and_receive(batch_of(grid, arrays=average, config=config))
    average = reply.content["arrays"]
    with pytest.raises(ConfigError, match=r"config\['lr'\] = 0.2, before 0.1"):
        made.send_and_receive(batch_of(grid, arrays=average, config=ConfigRecord({"lr": 0.2})))


def test_a_base_that_is_not_the_average_needs_a_word(simulated, tmp_path):
    grid = lab()
    made = SecureGrid(grid, grid.context, rounds=3, run_dir=str(tmp_path / "run"))
    made.send_and_receive(batch_of(grid, arrays=arrays_of(START)))
    with pytest.raises(ConfigError, match="server_optimizer=True"):
        made.send_and_receive(batch_of(grid, arrays=arrays_of(START)))


def test_clients_refuse_a_base_that_does_not_follow(simulated, tmp_path):
    """The server's own check is left out: the clients' is what counts."""
    grid = lab()
    made = SecureGrid(grid, grid.context, rounds=3, max_attempts=1, run_dir=str(tmp_path / "run"))
    made.send_and_receive(batch_of(grid, arrays=arrays_of(START)))
    made.secure_run.state.prompt = made.secure_run.state.prompt + 1
    for client in made.secure_run.clients.values():
        client.informed = 0
    made._check = lambda base: None
    with pytest.raises(RunFailedError):
        made.send_and_receive(batch_of(grid, arrays=arrays_of(START)))


def test_server_optimizers_are_in_the_terms_and_verify_nothing(simulated, tmp_path, caplog):
    with pytest.raises(ConfigError, match="FedOpt changes the average"):
        federate(lab(), tmp_path, strategy=strategies.FedAdam(**QUIET))
    grid = lab()
    _, made = federate(
        grid, tmp_path, rounds=3, strategy=strategies.FedAdam(**QUIET), server_optimizer=True
    )
    assert made.secure_run.state.terms.method.method == "flower-optimizer"
    assert not any("follow from sums" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "strategy",
    [strategies.FedMedian(), strategies.Krum(), strategies.MultiKrum(), strategies.Bulyan(),
     strategies.FedTrimmedAvg(), strategies.QFedAvg(0.1),
     strategies.DifferentialPrivacyServerSideFixedClipping(strategies.FedAvg(), 1.0, 1.0, 4)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_strategies_that_read_single_replies_are_refused_by_name(simulated, tmp_path, strategy):
    grid = lab()
    with pytest.raises(ConfigError, match=f"{type(strategy).__name__} reads single replies"):
        federate(grid, tmp_path, strategy=strategy)
    assert not grid.sent


# -- arrays ----------------------------------------------------------------------------------------


def test_arrays_that_are_no_floats_are_refused_or_stay(simulated, tmp_path):
    start = {**START, "bn.num_batches_tracked": np.array(7)}
    with pytest.raises(ConfigError, match=r"'bn.num_batches_tracked' has type int64.*exclude"):
        federate(lab(), tmp_path, start=start)
    seen = []

    def train(message, context):
        seen.append(int(message.content["arrays"]["bn.num_batches_tracked"].numpy()))
        return adding(1)(message, context)

    arrays, _ = federate(lab(4, n1=train), tmp_path, rounds=2, start=start, exclude=["bn.*"])
    assert seen == [7, 7]
    assert arrays["bn.num_batches_tracked"] == 7
    with pytest.raises(ConfigError, match="no array is called 'x'"):
        federate(lab(), tmp_path, start=start, exclude=["bn.*", "x"])


@given(
    st.lists(
        st.tuples(st.sampled_from(("float16", "float32", "float64")),
                  st.lists(st.integers(1, 3), max_size=3).map(tuple)),
        min_size=1, max_size=4,
    ),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_arrays_come_back_as_they_were(shapes, seed):
    rng = np.random.default_rng(seed)
    values = {f"a{i}": rng.normal(size=shape).astype(np.float16).astype(dtype)
              for i, (dtype, shape) in enumerate(shapes)}  # fmt: skip
    record = arrays_of({**values, "n": np.array([1, 2])})
    form = Form.of("train", RecordDict({"arrays": record}), ["n"], "num-examples")
    back = form.arrays(form.flat(record))
    assert list(back) == list(record)
    for name, array in record.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name].numpy(), array.numpy())


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"protection": "bfv"}, "the server would know no average"),
     ({"lr": 0.1}, "lr means nothing here"), ({"clip": "x"}, "clip"), ({"key": "a"}, "belong together"),
     ({"rounds": 0}, "as many as the strategy has")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_named(tmp_path, settings, text):
    with pytest.raises(ConfigError, match=text):
        SecureGrid(lab(), lab().context, **{"rounds": 1, **settings})


def test_more_rounds_than_agreed_are_refused(simulated, tmp_path):
    grid = lab()
    made = SecureGrid(grid, grid.context, rounds=1, run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="its 1 rounds are over"):
        strategies.FedAvg(**QUIET).start(made, arrays_of(START), 2)


# -- sites with files ------------------------------------------------------------------------------


def test_sites_keep_journal_ledger_and_audit_log(sites, tmp_path, capsys):
    configs, keys = sites
    grid = deployed(configs)
    arrays, _ = federate(grid, tmp_path, rounds=2, audit="full", **keys)
    assert arrays["w"][0, 0] == pytest.approx(2 * 0.125 * 2.5)
    assert all(not context.state for context in grid.contexts.values())
    tape = tmp_path / "state-alice" / "flower.tape"
    assert tape.stat().st_mode & 0o777 == 0o600
    ends = [f"--peer={tmp_path}/state-{name}" for name in ("alice", "bob", "carol", "dave")]
    assert audit([str(tmp_path / "run"), *ends]) == 0, capsys.readouterr().out


def test_a_node_speaks_for_the_member_whose_key_it_holds(sites, tmp_path):
    configs, keys = sites
    grid = deployed(configs)

    def claim(node, reply):
        fields = reply.content.config_records[wire.RECORD]
        if node == 4 and "name" in fields:
            fields["name"] = "bob"
        return reply

    grid.after = claim
    federate(grid, tmp_path, **keys)
    (row,) = made_rows(tmp_path)
    assert row["cohort"] == ["alice", "bob", "carol"]


def test_a_second_node_of_a_member_is_refused(sites, tmp_path):
    configs, keys = sites
    configs[5] = configs[2]
    federate(deployed(configs), tmp_path, **keys)
    (row,) = made_rows(tmp_path)
    assert row["cohort"] in (["alice", "carol", "dave"], ["alice", "bob", "carol", "dave"])


def test_a_real_node_believes_no_servers_roster(sites, tmp_path):
    configs, _ = sites
    grid = deployed(configs)
    with pytest.raises(RunFailedError, match="real ones need key and roster"):
        federate(grid, tmp_path)
    grid = LabGrid({node: app_of(adding(node)) for node in configs})  # without a client file
    with pytest.raises(RunFailedError, match="no node could be enrolled"):
        federate(grid, tmp_path)


def test_a_policy_has_to_allow_a_server_optimizer_by_name(sites, tmp_path):
    configs, keys = sites
    with pytest.raises((RunFailedError, TooFewClientsError)):
        federate(deployed(configs), tmp_path, server_optimizer=True,
                 strategy=strategies.FedAdam(**QUIET), **keys)  # fmt: skip
    for name in ("alice", "bob", "carol", "dave"):
        with (tmp_path / f"{name}.toml").open("a") as file:
            file.write('[policy]\nmethods = ["flower-optimizer"]\n')
    federate(deployed(configs), tmp_path / "again", rounds=2, server_optimizer=True,
             strategy=strategies.FedAdam(**QUIET), **keys)  # fmt: skip


class Killed(BaseException):
    """Nothing is kept of the step."""


def test_a_node_that_is_killed_in_the_middle_greets_anew(sites, tmp_path, monkeypatch):
    configs, keys = sites
    grid, killed = deployed(configs), []
    keep = site.DiskSite.keep

    def dying(self, kept):
        if self.member.name == "bob" and len(self.shelf.records) > 3 and not killed:
            killed.append(1)
            raise RuntimeError("killed")  # after the journal was written, before the tape
        keep(self, kept)

    monkeypatch.setattr(site.DiskSite, "keep", dying)
    federate(grid, tmp_path, rounds=3, **keys)
    rows = [row for row in made_rows(tmp_path) if row["outcome"] == "done"]
    assert killed
    assert [row["learning_round"] for row in rows] == [1, 2, 3]
    assert "bob" in rows[1]["cohort"]
    assert "bob" in rows[2]["cohort"]


@pytest.mark.parametrize("damage", [b"", b"\xc1", None, "said"])
def test_a_tape_that_is_damaged_is_begun_anew(sites, tmp_path, damage):
    configs, keys = sites
    grid, done = deployed(configs), []

    def lose(node, message):
        if (
            not done
            and node == 3
            and any(isinstance(f, m.Inbox) for f in frames_of(message.content))
        ):
            done.append(1)
            path = tmp_path / "state-carol" / "flower.tape"
            if damage is None:
                path.unlink()
            elif damage == "said":  # the same story, and other frames than those that left
                kept = msgspec.msgpack.decode(path.read_bytes(), type=site.Kept)
                kept.tape.round.said = bytes(32)
                path.write_bytes(msgspec.msgpack.encode(kept))
            else:
                path.write_bytes(damage)
        return False

    grid.lose = lose
    federate(grid, tmp_path, rounds=2, **keys)
    rows = [row for row in made_rows(tmp_path) if row["outcome"] == "done"]
    assert [row["learning_round"] for row in rows] == [1, 2]
    assert "carol" in rows[0]["dropped"]
    assert "carol" in rows[1]["cohort"]
    assert read_roster(keys["roster"])


@pytest.mark.parametrize(("ago", "left"), [(4.0, 6.0), (60.0, 0.0), (-1e6, 10.0), (1e6, 0.0)])
def test_a_clock_that_jumps_delays_no_upload_for_ever(
    ago: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mod.time, "time", lambda: 1e9)
    assert mod._left(10.0, 1e9 - ago) == left
