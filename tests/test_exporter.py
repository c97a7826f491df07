"""What a running server shows to Prometheus: sums, and nothing of anybody."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import names

from secure_fedprompt.__main__ import main
from secure_fedprompt.commands import watch_remote
from secure_fedprompt.commands.demo_files import free_port
from secure_fedprompt.protocol.errors import ConfigError, UnreachableError
from secure_fedprompt.server.exporter import Exporter

pytest.importorskip("prometheus_client")
LABELS = {"outcome", "direction", "stage", "kind"}


def asked(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def values(text: str) -> dict[str, float]:
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def test_a_run_is_counted_and_nobody_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, 5, metrics="rounds", rounds=2)
    exporter = Exporter("127.0.0.1:0", 2)
    rows: list[dict[str, Any]] = []
    try:
        world.store.on_event.append(exporter.on_event)
        world.store.on_event.append(
            lambda kind, value: rows.append(value) if kind == "round" else None
        )
        for name in names(5):
            world.join(name)
        world.store.count(1, "c001", "up", "MaskedUpload", 1000)
        world.store.count(1, "c002", "up", "MaskedUpload", 234)
        world.pump()
        world.store.event("fault", "c003 sent nonsense")
        world.store.event("joined", "c004")
        text = asked(exporter.address)
    finally:
        exporter.close()
    found = values(text)
    assert found['fedprompt_rounds_total{outcome="done"}'] == len(rows) == 3
    assert found["fedprompt_learning_round"] == found["fedprompt_learning_rounds_wanted"] == 2
    assert found["fedprompt_clients_in_sum"] == 5
    assert found['fedprompt_bytes_total{direction="up"}'] == 1234
    assert found['fedprompt_events_total{kind="fault"}'] == 1
    assert found['fedprompt_events_total{kind="other"}'] >= 1
    assert "accuracy" in rows[0]["metrics"]  # the server knows it, and keeps it
    for private in (*names(5), "nonsense", "accuracy", "loss"):
        assert private not in text, private
    own = [line for line in text.splitlines() if line.startswith("fedprompt_")]
    assert set(re.findall(r'(\w+)="', "\n".join(own))) <= LABELS


def test_the_server_program_answers_while_it_waits(federation: Any) -> None:
    port = free_port()
    f = federation(gather_seconds=600.0, metrics_bind=f"127.0.0.1:{port}")
    f.start(0)
    f.wait_for("server", "waiting for 4 clients")
    assert values(asked(f"127.0.0.1:{port}"))['fedprompt_rounds_total{outcome="done"}'] == 0
    words = [
        *f.commands[0],
        "--run-dir",
        str(f.folder / "other"),
        "--bind",
        f"tcp://127.0.0.1:{free_port()}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot be listened on" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("address", ["9570", "localhost:", "localhost:x", "localhost:70000", ":1"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match=f"metrics_bind = '{address}'"):
        Exporter(address, 1)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'secure-fedprompt\[metrics\]'"):
        Exporter("127.0.0.1:0", 1)


# -- watch, from another machine -------------------------------------------------------------------


def told(exporter: Exporter, number: int, outcome: str = "done") -> None:
    exporter.on_event("round", {
        "outcome": outcome, "learning_round": number, "bytes": {"up": {"a": 1500}, "down": {"a": 7}},
        "seconds": {"training": 2.0}, "dropped": {"d": "training"}, "cohort": ["a", "b", "c", "d"],
    })  # fmt: skip


def test_watch_from_another_machine_follows_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exporter = Exporter("127.0.0.1:0", 2)
    address, waited = f"http://{exporter.address}", list[float]()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) <= 2:
            told(exporter, len(waited))
        elif len(waited) == 3:
            exporter.close()

    now = watch_remote.follow(address, False, 0.5, wait)
    assert waited == [0.5] * (2 + watch_remote.PATIENCE)
    assert now["learning_round"] == 2
    assert now["bytes"] == {"up": 3000, "down": 14}
    assert now["clients_in_sum"] == 3
    shown = capsys.readouterr().out
    assert "3.0 kB up" in shown
    assert "the server has ended" in shown


def test_watch_says_when_a_server_is_gone_before_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exporter = Exporter("127.0.0.1:0", 3)
    address, path = f"http://{exporter.address}", tmp_path / "now.json"
    told(exporter, 1)
    told(exporter, 2, "aborted")
    exporter.on_event("lost", "d")
    assert main(["watch", address, "--once", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["format"].startswith("secure-fedprompt/metrics/")
    assert (found["rounds_done"], found["learning_rounds"], found["losses"]) == (1, 3, 2)
    assert found["outcomes"] == {"done": 1, "aborted": 1}
    assert found["events"]["lost"] == 1
    assert "lost 1" in capsys.readouterr().out
    with pytest.raises(UnreachableError, match="went away after learning round 1 of 3"):
        watch_remote.follow(address, False, 0.0, lambda seconds: exporter.close())
    assert main(["watch", address]) == 3
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "text"),
    [(b"# nothing\n", "no server of secure-fedprompt"), (b"one two three\n", "something else"),
     (b"\xff\xfe", "something else"), (b"up 1\n", "no server of secure-fedprompt")],
)  # fmt: skip
def test_watch_refuses_what_is_no_server_of_ours(
    answer: bytes, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert main(["watch", f"http://127.0.0.1:{server.server_port}"]) == 2
        thread.join()
    assert text in capsys.readouterr().err
