"""Other systems at the same work: each in a virtual environment of its own, made here.

A peer is a script in ``benchmarks/peers`` that knows nothing of this project: it takes a case as
JSON and a number of repetitions, and its last line is an object of samples by figure, under the
names that the chapter has for ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secure_fedprompt.bench import book
from secure_fedprompt.bench.chapter import Case, Samples
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError

LONGEST = 3600.0  # seconds of one case
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
         "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
OLD = {"SKLEARN_ALLOW_DEPRECATED_SKLEARN_PACKAGE_INSTALL": "True"}  # CrypTen names it so
ITSELF = "secure-fedprompt"


@dataclass(frozen=True)
class Peer:
    """Another system.

    Attributes:
        label: as tables name it.
        requires: what pip installs; the first one's version is kept with the figures.
        script: in ``benchmarks/peers``.
        lacks: what it leaves out of what ours does.
        needs: what a case lacks for it, computed from the case.
        environment: shared by peers of the same packages; its own name otherwise.
    """

    label: str
    requires: tuple[str, ...]
    script: str
    lacks: str
    needs: Callable[[Case], Case] = lambda case: {}
    environment: str = ""


def _flower_shares(case: Case) -> Case:
    from secure_fedprompt.bench.scale import shares_of

    degree, threshold = shares_of(case)
    return {"shares": degree + 1, "threshold": threshold}


_BRIDGE = ("flwr[simulation]==1.42.0", ITSELF)
_FLOWER = "signatures, checked sums, hidden image counts, mask seeds beyond 32 bits"
PEERS = {
    "flower": Peer("Flower SecAgg+", ("flwr==1.42.0",), "flower_secagg.py", _FLOWER,
                   _flower_shares),
    "nvflare": Peer("NVFlare HE", ("nvflare[HE]==2.9.0",), "nvflare_he.py",
                    "signatures, checked sums"),
    "spu": Peer("SPU CHEETAH", ("spu==0.9.5", "jax<0.5", "setuptools<80"), "spu_compare.py",
                "selections: comparisons only"),
    "crypten": Peer("CrypTen", ("crypten==0.4.1", "torch", "setuptools<80"), "crypten_compare.py",
                    "doing without a dealer, who is trusted with all randomness"),
    "opacus": Peer("Opacus", ("opacus", "open_clip_torch", "torch", "torchvision"),
                   "opacus_gradients.py", "shorter text: all 77 tokens, no cached prefix",
                   lambda case: {"model": str(book.CHECKOUT / "secure_fedprompt/bundled_clip")}),
    "bridge": Peer("our bridge", _BRIDGE, "flower_bridge.py", "", lambda case: {"kind": "masks"},
                   "flower-simulated"),
    "flower-clear": Peer("Flower, nothing protected", _BRIDGE, "flower_bridge.py",
                         "any protection", lambda case: {"kind": "clear"}, "flower-simulated"),
    "flower-secagg": Peer("Flower SecAgg+", _BRIDGE, "flower_bridge.py", _FLOWER,
                          lambda case: {"kind": "secagg+"}, "flower-simulated"),
}  # fmt: skip


def python_of(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Raises:
        ConfigError: the scripts are not here.
        RunFailedError: it cannot be made, with pip's own last line.
    """
    checkout, peer = book.benchmarks(), PEERS[name]
    if checkout is None:
        raise ConfigError("--peers: their scripts are in the repository, not in the package")
    home = folder / (peer.environment or name)
    python, done = home / "bin" / "python", home / "complete"
    if not done.exists():
        words = [str(book.CHECKOUT) if word == ITSELF else word for word in peer.requires]
        say(f"installing {', '.join(peer.requires)} in {home}")
        home.parent.mkdir(parents=True, exist_ok=True)
        _quietly([sys.executable, "-m", "venv", "--clear", str(home)])
        _quietly([str(python), "-m", "pip", "install", "-q", *words])
        done.touch()
    return python


def _quietly(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False,
                          env={**os.environ, **OLD})  # fmt: skip
    if done.returncode:
        raise RunFailedError(f"{' '.join(words[-3:])}: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def measure(name: str, python: Path, case: Case, repeat: int) -> Samples:
    """A case as the peer does it.

    Raises:
        RunFailedError: with its own last line.
    """
    peer = PEERS[name]
    script = book.CHECKOUT / "benchmarks" / "peers" / peer.script
    words = [str(python), str(script), json.dumps({**case, **peer.needs(case)}), str(repeat)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LONGEST,
                              env={**os.environ, **QUIET})  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"{peer.label}: not done after {LONGEST:.0f} s") from None
    try:
        found: Mapping[str, list[float]] = json.loads(last_line(done.stdout))
    except ValueError:
        found = {}
    if done.returncode or not isinstance(found, dict) or not found:
        raise RunFailedError(f"{peer.label}: {last_line(done.stderr)}")
    return found


def version(name: str, python: Path) -> str:
    """Of the package that a peer is."""
    package = PEERS[name].requires[0].partition("=")[0].partition("[")[0]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return f"{package} {done.stdout.strip()}"
