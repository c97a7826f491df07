"""``secure-fedprompt report``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from secure_fedprompt.audit import summary
from secure_fedprompt.host import command
from secure_fedprompt.host.forms import formed
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.report.gather import gather
from secure_fedprompt.report.page import page

EXAMPLES = """\
  secure-fedprompt report runs/monday -o monday.html
  secure-fedprompt report runs/monday --peer state/alice --client state/alice
  # under bfv and ckks only clients know the accuracy
  secure-fedprompt report runs/monday --client-json alice.json"""


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt report",
        "One self-contained HTML page about a server's run: what ran, who learned what, accuracy, "
        "bytes, time, dropouts, privacy spent, and the audit. It opens from a file, without a "
        "network and without scripts.",
        EXAMPLES,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the server's run_dir")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE",
                        help="of the page; default report.html")  # fmt: skip
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], metavar="RUN",
        help="log of another end, for the audit; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--client", type=Path, action="append", default=[], metavar="STATE",
        help="a client's state_dir, for what its DP-SGD has spent",
    )  # fmt: skip
    parser.add_argument(
        "--client-json", type=Path, metavar="FILE",
        help="what a client's --json wrote: metrics that only clients could open",
    )  # fmt: skip
    args = parser.parse_args(argv)

    def body() -> int:
        report = gather(args.run_dir, args.peer, args.client, args.client_json)
        try:
            args.out.write_text(page(report), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {args.out} cannot be written: {error.strerror}") from None
        Console(highlight=False).print(f"{args.out}, {args.out.stat().st_size / 1000:.0f} kB")
        told = {**dataclasses.asdict(report), "audit": None}
        if report.audit is not None:
            told["audit"] = formed("audit-result", summary.as_json(report.audit))
        command.write_json(args.json, "report", told)
        return 0

    return command.guard(body, args)
