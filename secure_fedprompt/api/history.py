"""What a federation did, for people who work in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.errors import ConfigError

Figures = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class History:
    """A run, round by round. R are its learning rounds.

    Attributes:
        summary: all that is known, as ``--json`` writes it (docs/json.md).
        accuracy: (R + 1,) of the global prompt on all clients' test images, before each learning
            round and after the last one; NaN where it was not counted.
        loss: (R + 1,) mean cross-entropy, in the same places.
        zero_shot: accuracy of "a photo of a NAME.", or NaN.
        clients: (R,) whose updates are in the sum.
        bytes_up, bytes_down: (R,) of a client, the mean over the cohort.
        seconds: (R,) of the wall, training included; NaN where it is not known.
        personal: by client, accuracy of its own prompt on its own test images, at the end.
        epsilon: by client with DP-SGD, what its images have spent at its delta.
        prompt: the global prompt, float32 tensors by name.
    """

    summary: Mapping[str, Any]
    accuracy: Figures
    loss: Figures
    zero_shot: float
    clients: NDArray[np.int64]
    bytes_up: Figures
    bytes_down: Figures
    seconds: Figures
    prompt: dict[str, NDArray[np.float32]]
    personal: dict[str, float] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        summary: Mapping[str, Any],
        prompt: dict[str, NDArray[np.float32]],
        seconds: Mapping[int, float] | None = None,
        personal: dict[str, float] | None = None,
        epsilon: dict[str, float] | None = None,
    ) -> History:
        """From a run's summary.

        Args:
            seconds: by learning round; else those that the server measured.
        """
        count = int(summary["learning_rounds"])
        done = {r["learning_round"]: r for r in summary["rounds"] if r["outcome"] == "done"}
        numbers = range(1, count + 1)
        zero = summary.get("zero_shot")

        def counted(name: str) -> Figures:
            rows = (done.get(number, {}).get("metrics", {}) for number in range(1, count + 2))
            return np.array([row.get(name, np.nan) for row in rows], float)

        def each(way: str) -> Figures:
            rows = [done.get(number) for number in numbers]
            return np.array(
                [sum(r["bytes"][way].values()) / len(r["cohort"]) if r else np.nan for r in rows]
            )

        def took(number: int) -> float:
            if seconds is not None:
                return seconds.get(number, np.nan)
            return sum(done[number]["seconds"].values()) if number in done else np.nan

        return cls(
            summary=summary,
            accuracy=counted("accuracy"),
            loss=counted("loss"),
            zero_shot=np.nan if zero is None else float(zero),
            clients=np.array(
                [len(done[n]["cohort"]) - len(done[n]["dropped"]) if n in done else 0
                 for n in numbers], np.int64,
            ),
            bytes_up=each("up"),
            bytes_down=each("down"),
            seconds=np.array([took(number) for number in numbers]),
            prompt=prompt,
            personal=personal or {},
            epsilon=epsilon or {},
        )  # fmt: skip

    def __repr__(self) -> str:
        known = self.accuracy[~np.isnan(self.accuracy)]
        words = f"{self.summary['method']} under {self.summary['protection']}, {len(self)} rounds"
        if len(known):
            words += f", accuracy {known[0]:.1%} -> {known[-1]:.1%}"
        if not np.isnan(self.zero_shot):
            words += f", zero-shot {self.zero_shot:.1%}"
        return f"History({words})"

    def __len__(self) -> int:
        return len(self.clients)

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each learning round, and figures from after it.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise _extra("to_pandas") from None
        index = pandas.RangeIndex(1, len(self) + 1, name="round")
        return pandas.DataFrame(
            {
                "accuracy": self.accuracy[1:],
                "loss": self.loss[1:],
                "clients": self.clients,
                "bytes_up": self.bytes_up,
                "bytes_down": self.bytes_down,
                "seconds": self.seconds,
            },
            index=index,
        )

    def plot(self, axes: Any = None) -> Any:
        """Accuracy by round, with zero-shot as a line, into matplotlib ``axes`` or new ones.

        Returns:
            the axes.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        if axes is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                raise _extra("plot") from None
            _, axes = plt.subplots()
        name = f"{self.summary['method']} under {self.summary['protection']}"
        axes.plot(np.arange(len(self.accuracy)), self.accuracy, "o-", label=name)
        if not np.isnan(self.zero_shot):
            axes.axhline(self.zero_shot, color="grey", linewidth=1, label="zero-shot")
        axes.set_xlabel("learning rounds")
        axes.set_ylabel("accuracy of the global prompt")
        axes.legend()
        return axes


def _extra(what: str) -> ConfigError:
    return ConfigError(f"History.{what} needs: pip install 'secure-fedprompt[notebook]'")
