"""One target under atheris: ``python tests/fuzz/run.py TARGET CORPUS [-max_total_time=60 ...]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
with atheris.instrument_imports(include=["secure_fedprompt"]):
    import targets


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(targets.seeds()[name]):
        path = folder / f"seed-{number:03d}"
        if not path.exists():
            path.write_bytes(data)
    atheris.Setup([sys.argv[0], str(folder), "-max_len=8192", "-timeout=20", *options],
                  targets.TARGETS[name])  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
