"""Make the fixture of a release: the files that two of its ends leave behind, in one small archive.

    python tests/make_release.py NAME DEMO      # a folder that its "demo --rounds 2" has written

Run with the release's own code; the archive goes to tests/fixtures/releases/NAME.tar.xz.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

KEPT = (
    "roster.toml", "alice/alice.entry.toml", "alice/client.toml", "server/server.toml",
    "server/run/server.json", "server/run/run.sqlite", "server/run/summed.bin",
    "server/run/prompts/global-0002.safetensors", "server/run/audit/*", "alice/state/journal.jsonl",
    "alice/state/privacy.jsonl", "alice/state/prompt-*", "alice/state/audit/*", "alice/state/kept/*",
)  # fmt: skip


def main() -> int:
    name, demo = sys.argv[1], Path(sys.argv[2])
    target = Path(__file__).parent / "fixtures" / "releases" / f"{name}.tar.xz"
    with tarfile.open(target, "w:xz") as archive:
        for path in sorted({p for pattern in KEPT for p in demo.glob(pattern)}):
            data = path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(demo)))
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    print(target, target.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
