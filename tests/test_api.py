"""Federations from Python: settings, own images, method and partition, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

import secure_fedprompt as sfp
from secure_fedprompt.clients.methods.base import Method, parameter
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.commands.simulate import make_trainers, simulate_run
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.methods import METHODS
from secure_fedprompt.protocol.protections import PROTECTIONS
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store

SMALL: dict[str, Any] = {
    "clients": 3, "rounds": 2, "generated_classes": 4, "per_class": 6, "test_per_class": 3,
    "styles": "sketch", "n_ctx": 2, "epochs": 1, "batch_size": 8, "lr": 0.05, "seed": 1,
    "threads": 1, "progress": False,
}  # fmt: skip
NAMES = ("circle", "square", "heart")


class Bias(Method):
    """Zero-shot logits and a bias for each class."""

    name = "bias"

    def __init__(self, settings: Any, backbone: Any, class_names: Any) -> None:
        self.backbone, self.text = backbone, backbone.zero_shot_features(class_names)
        self.shared = {"bias": parameter(np.zeros(len(class_names), np.float32), backbone)}
        self.own = {}

    def logits(self, batch: Any) -> torch.Tensor:
        cosine: torch.Tensor = self.backbone.scale * batch.images @ self.text.T
        return cosine + self.shared["bias"]


class Pairs(Dataset[Any]):
    """A data set in PyTorch's habit, with no list of its labels."""

    def __init__(self, make: Callable[[int], Any], count: int = 24) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.make(i), i % len(NAMES)


def colour(i: int) -> np.ndarray:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., i % len(NAMES)] = 200
    return pixels


def own_images(count: int = 24) -> sfp.ImageSet:
    images = np.stack([colour(i) for i in range(count)])
    return sfp.ImageSet.from_arrays(images, np.arange(count) % len(NAMES), NAMES)


def test_the_history_is_the_run_of_the_command(tmp_path: Path) -> None:
    """Same seeds, same protocol: the accuracy, the prompt and the bytes."""
    rows: list[dict[str, Any]] = []
    history = sfp.simulate(**SMALL, on_round=rows.append)
    names = ClientSettings.__struct_fields__
    own = {k: v for k, v in SMALL.items() if k in names} | {"parts": 3}
    server = {k: v for k, v in SMALL.items() if k in ServerSettings.__struct_fields__}
    settings = ServerSettings(
        **{k: v for k, v in server.items() if k != "clients"}, metrics="rounds"
    )
    store = Store(tmp_path, settings)
    trainers = make_trainers(ClientSettings(**own), settings.method_settings())
    done = simulate_run(settings, store, trainers)
    summary = store.summary()
    store.close()
    accuracy = [row["metrics"]["accuracy"] for row in summary["rounds"]]
    assert np.allclose(history.accuracy, accuracy, atol=0.1)
    near = np.abs(history.prompt["ctx"].reshape(-1) - done.prompt).max()
    assert near < 1e-5  # rounding is drawn
    assert np.abs(done.prompt - trainers["client000"].prepare(settings).initial()).max() > 1e-3
    assert [row["learning_round"] for row in rows] == [1, 2, 3]
    assert history.clients.tolist() == [3, 3]
    up = sum(summary["rounds"][0]["bytes"]["up"].values()) / 3
    assert abs(history.bytes_up[0] - up) < 60  # signatures' numbers vary in length: none; rolls may
    assert (history.seconds > 0).all()
    assert set(history.personal) == {"client000", "client001", "client002"}
    assert history.epsilon == {}
    assert "promptfl under masks, 2 rounds, accuracy" in repr(history)


@pytest.mark.parametrize("protection", ["bfv", "none"])
def test_protections_end_alike(protection: str) -> None:
    masked = sfp.simulate(**SMALL)
    other = sfp.simulate(**SMALL, protection=protection)
    assert np.abs(masked.prompt["ctx"] - other.prompt["ctx"]).max() < 1e-4
    assert np.allclose(masked.accuracy, other.accuracy, atol=0.1)
    assert not np.isnan(other.accuracy).any()  # told by clients, where the server knows nothing


@pytest.mark.slow
def test_processes_end_as_one_does_private_parts_too() -> None:
    """FedMGP keeps groups at home: each client's own accuracy depends on them."""
    small = SMALL | {"method": "fedmgp", "fedmgp": {"groups": 2, "slots": 1}, "protection": "none"}
    inline, others = (
        sfp.simulate(**small, engine=engine, workers=workers)
        for engine, workers in (("inline", 0), ("processes", 2))
    )
    assert all(np.array_equal(inline.prompt[k], others.prompt[k]) for k in inline.prompt)
    assert inline.personal == others.personal
    assert inline.accuracy.tolist() == others.accuracy.tolist()


@pytest.mark.parametrize(
    "make",
    [
        own_images,
        lambda: (own_images(24), own_images(12)),
        lambda: sfp.ImageSet.from_dataset(Pairs(colour), NAMES),
        lambda: sfp.ImageSet.from_dataset(Pairs(lambda i: Image.fromarray(colour(i))), NAMES),
        lambda: sfp.ImageSet.from_dataset(
            Subset(
                Pairs(lambda i: torch.from_numpy(colour(i) / 255).permute(2, 0, 1), 40), range(24)
            ),
            NAMES,
        ),
    ],
    ids=["arrays", "pair", "dataset", "pictures", "tensors"],
)
def test_own_images(make: Callable[[], Any]) -> None:
    data = make()
    first = data[0] if isinstance(data, tuple) else data
    assert np.array_equal(np.asarray(first.image(4)), colour(4))
    history = sfp.simulate(dataset=data, clients=3, rounds=1, n_ctx=2, epochs=3, lr=0.5, seed=1,
                           threads=1, progress=False)  # fmt: skip
    assert history.accuracy.shape == (2,)
    assert sum(row["metrics"].get("seen", 0) for row in history.summary["rounds"][:1]) in (6, 12)


def test_own_partition_and_method() -> None:
    given: list[tuple[int, int, int, int]] = []

    def halves(train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> list[Any]:
        given.append((len(train), len(test), clients, seed))
        own = np.array_split(np.arange(len(train)), clients)
        return [(index, np.flatnonzero(test == i)) for i, index in enumerate(own)]

    history = sfp.simulate(Bias, **SMALL, partition=halves, data_seed=7)
    assert given == [(24, 12, 3, 7)]
    assert history.prompt["bias"].shape == (4,)
    assert history.prompt["bias"].any()
    assert history.summary["method"] == "bias"
    assert "bias" not in METHODS


class Halved(sfp.Protection):
    """Half precision."""

    name = "halved"

    def protect(self, plan: Any, vector: Any, entropy: Any) -> bytes:
        return vector.astype("<f2").tobytes()

    def total(self, plan: Any) -> sfp.Total:
        return HalvedTotal()


class HalvedTotal(sfp.Total):
    def __init__(self) -> None:
        self.sum = np.zeros(())

    def add(self, data: bytes | memoryview) -> None:
        self.sum = self.sum + np.frombuffer(data, "<f2")

    def result(self) -> Any:
        return self.sum


def test_own_protection() -> None:
    """Its uploads are half as large as float32 ones, and the prompts nearly those without it."""
    sizes: list[int] = []

    def look(sender: str, recipient: str, message: Any) -> None:
        if sender and type(message).__name__ == "PlainUpload":
            sizes.append(len(message.vector))

    own = sfp.simulate(**SMALL, protection=Halved(), on_frame=look)
    plain = sfp.simulate(**SMALL, protection="none")
    assert set(sizes[:3]) == {
        2 * len(np.concatenate([x.ravel() for x in own.prompt.values()])) + 14
    }
    for name, values in plain.prompt.items():
        assert np.allclose(own.prompt[name], values, atol=2e-3)
        assert not np.array_equal(own.prompt[name], values)
    assert own.summary["protection"] == "halved"
    assert "halved" not in PROTECTIONS
    Halved.name = "masks"
    try:
        with pytest.raises(
            sfp.SecureFedPromptError, match="the package has a protection of this name"
        ):
            sfp.simulate(**SMALL, protection=Halved())
    finally:
        Halved.name = "halved"


def test_what_dp_spends_is_told() -> None:
    history = sfp.simulate(**SMALL | {"rounds": 1},
                           dp={"kind": "sample", "noise_multiplier": 2.0, "delta": 1e-3})  # fmt: skip
    assert set(history.epsilon) == {"client000", "client001", "client002"}
    assert all(0 < value < 10 for value in history.epsilon.values())
    assert np.isnan(history.accuracy).all() or (history.accuracy == 0).all()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"epoch": 3}, r"no setting 'epoch'; did you mean 'epochs'\?"),
    "type": ({"lr": "fast"}, "lr"),
    "range": ({"rounds": 0}, "rounds"),
    "choice": ({"protection": "mask"}, "protection = 'mask': must be one of"),
    "method": ({"method": "promptfll"}, "did you mean 'promptfl'"),
    "nested": ({"fedmgp": {"group": 2}}, "group"),
    "dropout": ({"dropout": 1.5}, "dropout = 1.5"),
    "engine": ({"engine": "processes", "partition": lambda *_: []}, "need inline"),
    "absent": ({"bind": "tcp://x"}, "no setting 'bind'"),
    "nameless method": ({"method": Method}, "subclass of Method with a name"),
    "no method": ({"method": dict}, "subclass of Method with a name"),
    "shares": ({"partition": lambda *_: [([0], [0])]}, "1 shares for 3 clients"),
    "index": ({"partition": lambda *_: [([0], []), ([1], []), ([99], [])]}, "train index beyond"),
    "twice": ({"partition": lambda *_: [([0], []), ([1], []), ([0], [])]}, "at two clients"),
    "empty": ({"partition": lambda *_: [([0], []), ([1], []), ([], [])]}, "client 2 has no"),
    "three sets": ({"dataset": (own_images(), own_images(), own_images())}, "3 sets"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    change, words = WRONG[case]
    with pytest.raises(errors.ConfigError, match=words) as caught:
        sfp.simulate(**(SMALL | change))
    assert "\n" not in str(caught.value)


PIXELS = np.zeros((4, 8, 8, 3), np.uint8)
BAD_IMAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "labels": (lambda: sfp.ImageSet.from_arrays(PIXELS, [0, 1, 2], NAMES), "4 integers expected"),
    "floats": (lambda: sfp.ImageSet.from_arrays(PIXELS, [0.0] * 4, NAMES), "4 integers expected"),
    "range": (lambda: sfp.ImageSet.from_arrays(PIXELS, [0, 1, 3, 0], NAMES), r"labels\[2\] = 3"),
    "names": (lambda: sfp.ImageSet.from_arrays(PIXELS, [0] * 4, ["a", "a"]), "no name twice"),
    "domains": (lambda: sfp.ImageSet.from_arrays(PIXELS, [0] * 4, NAMES, ["x"]), "1 for 4 images"),
    "no names": (lambda: sfp.ImageSet.from_dataset(Pairs(colour)), "class_names"),
    "normalised": (
        lambda: sfp.ImageSet.from_arrays(PIXELS - 0.5, [0] * 4, NAMES).image(0), "not normalised"),
    "shape": (
        lambda: sfp.ImageSet.from_arrays(PIXELS[..., :2], [0] * 4, NAMES).image(0), r"\(8, 8, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_are_none_are_named(case: str) -> None:
    make, words = BAD_IMAGES[case]
    with pytest.raises(errors.DataError, match=words):
        make()


def test_domains_are_numbered_by_name() -> None:
    made = sfp.ImageSet.from_arrays(PIXELS, [0] * 4, NAMES, ["b", "a", "b", "a"])
    assert made.domain_names == ("a", "b")
    assert made.domains.tolist() == [1, 0, 1, 0]


@pytest.mark.slow
def test_tables_and_plots() -> None:
    pandas = pytest.importorskip("pandas")
    mpl = pytest.importorskip("matplotlib")
    mpl.use("agg")
    history = sfp.simulate(**SMALL)
    table = history.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table.index.tolist() == [1, 2]
    assert table["accuracy"].tolist() == history.accuracy[1:].tolist()
    axes = history.plot()
    assert axes.lines[0].get_ydata().tolist() == history.accuracy.tolist()
    assert history.plot(axes) is axes
    mpl.pyplot.close("all")


def test_a_run_that_exists_is_left_alone(tmp_path: Path) -> None:
    sfp.simulate(**SMALL, run_dir=str(tmp_path / "run"))
    assert (tmp_path / "run" / "run.sqlite").exists()
    with pytest.raises(errors.ConfigError, match="holds a finished run"):
        sfp.simulate(**SMALL, run_dir=str(tmp_path / "run"))


@pytest.mark.slow
def test_a_federation_of_processes(tmp_path: Path) -> None:
    images = {"generated_classes": 4, "per_class": 6, "test_per_class": 3, "shots": 6}
    with sfp.Federation(
        tmp_path / "here", clients=3, rounds=1, for_clients=images, for_server={"epochs": 1}
    ) as run:
        lines: list[str] = []
        history = run.wait(on_line=lines.append)
    assert history.accuracy.shape == (2,)
    assert history.prompt["ctx"].shape[:2] == (1, 4)
    assert history.seconds[0] > 0
    assert run.prompt.exists()
    assert any("round 1/1: accuracy before" in line for line in lines)
    assert all(process.poll() == 0 for process in run._processes)


def test_a_federation_ends_with_its_block_and_says_what_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), sfp.Federation(tmp_path / "a", clients=3) as run:
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in run._processes)
    wrong = sfp.Federation(tmp_path / "b", clients=3, for_clients={"class_list": "/no/such/list"})
    with pytest.raises(errors.RunFailedError, match="not done within"), wrong as run:
        run.wait(seconds=0)
    with pytest.raises(errors.ConfigError, match="start with the 'with' block"):
        sfp.Federation(tmp_path / "c", clients=3).wait()
    for change, words in (
        ({"clients": 2}, "at least 3"), ({"rounds": 0}, "rounds"), ({"folder": tmp_path}, "not empty"),
        ({"for_server": {"epoch": 1}}, "for_server: unknown key 'epoch'"),
        ({"for_clients": {"part": "one"}}, "for_clients"), ({"dp": {"kind": "sample"}}, "dp.kind"),
    ):  # fmt: skip
        with pytest.raises(errors.ConfigError, match=words):
            sfp.Federation(**{"folder": tmp_path / "d", "clients": 3, **change})
