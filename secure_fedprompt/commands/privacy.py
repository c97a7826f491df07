"""``secure-fedprompt privacy``: what DP-SGD will cost before a run, and what has been spent."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from rich.console import Console

from secure_fedprompt.clients.accounting import Steps, epsilon, noise_for, steps_of
from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.host import command
from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.settings import Accountant

EXAMPLES = """\
  # the noise that keeps 10 rounds of 4 epochs over 400 images within epsilon 8
  secure-fedprompt privacy plan --images 400 --batch-size 32 --epochs 4 --rounds 10 \\
      --target-epsilon 8 --delta 1e-4
  # the epsilon of a given noise
  secure-fedprompt privacy plan --images 400 --rounds 10 --noise-multiplier 1.1
  # what the images of a client have been spent on
  secure-fedprompt privacy status state/alice"""
DEFAULTS = PrivacySettings()


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt privacy",
        "Epsilon of DP-SGD (dp.kind = 'sample'): 'plan' before anything runs; 'status': what a "
        "client has spent, with and without dp, on its images and as a whole client. "
        "The guarantee of DP-SGD is about one image more or less in everything that a client sends "
        "from its training; it does not cover how many images it has. 'explain --dp-noise' plans "
        "the noise of whole clients.",
        EXAMPLES,
    )
    parser.add_argument("action", choices=("plan", "status"), help="before a run, or after")
    parser.add_argument("folder", nargs="?", type=Path, help="of status: a client's state_dir")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="training images")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="expected")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="of one round")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of the run")
    text = "find the noise for it"
    parser.add_argument("--target-epsilon", type=float, default=0.0, metavar="E", help=text)
    text = "find its epsilon"
    parser.add_argument("--noise-multiplier", type=float, default=0.0, metavar="S", help=text)
    parser.add_argument(
        "--delta", type=float, metavar="D",
        help=f"plan: default {DEFAULTS.delta:g}; status: default what the client counts with",
    )  # fmt: skip
    text = f"plan: default {DEFAULTS.accountant}; status: default what the client counts with"
    parser.add_argument("--accountant", choices=get_args(Accountant), help=text)
    args = parser.parse_args(argv)
    if args.action == "plan":
        args.delta = DEFAULTS.delta if args.delta is None else args.delta
        args.accountant = args.accountant or DEFAULTS.accountant
    body = _plan if args.action == "plan" else _status
    return command.guard(lambda: body(args), args)


def _plan(args: argparse.Namespace) -> int:
    for name in ("images", "batch_size", "epochs", "rounds"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} = {getattr(args, name)}: at least 1")
    if not 0 < args.delta < 1:
        raise ConfigError(f"--delta = {args.delta}: must lie between 0 and 1")
    if (args.target_epsilon > 0) == (args.noise_multiplier > 0):
        raise ConfigError("set exactly one of --target-epsilon and --noise-multiplier, above 0")
    rate, steps = steps_of(args.images, args.batch_size, args.epochs)
    count = steps * args.rounds
    sigma = args.noise_multiplier or noise_for(
        args.target_epsilon, args.delta, rate, count, (), args.accountant
    )
    taken = [Steps(sigma, rate, count)]
    found = {name: epsilon(taken, args.delta, name) for name in ("prv", "rdp")}
    console = Console(highlight=False)
    console.print(
        f"{args.rounds} rounds of {steps} steps, each image in a step with probability {rate:.4g}\n"
        f"noise multiplier {sigma:.4g}: epsilon {found['prv']:.4g} (prv), {found['rdp']:.4g} (rdp) "
        f"at delta {args.delta:g}",
        soft_wrap=True,
    )
    if args.delta > 1 / args.images:
        console.print(
            f"[yellow]delta {args.delta:g} is above one over {args.images} images[/]: it would "
            "allow to publish an image"
        )
    result = {"noise_multiplier": sigma, "rate": rate, "steps": count, "delta": args.delta}
    told = {"epsilon": found[args.accountant], "accountant": args.accountant}
    command.write_json(
        args.json, "privacy-plan", {**result, **told, "epsilon_by_accountant": found}
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    if args.folder is None:
        raise ConfigError("name a client's state folder: secure-fedprompt privacy status DIR")
    path = args.folder / NAME
    if not path.exists():
        raise ConfigError(f"{path}: no such file; this client has not trained")
    ledger, console = Ledger.read(path), Console(highlight=False)
    delta, accountant = ledger.counting
    args.delta = delta if args.delta is None else args.delta
    args.accountant = args.accountant or accountant
    if not 0 < args.delta < 1:
        raise ConfigError(f"--delta = {args.delta}: must lie between 0 and 1")
    runs = dict.fromkeys([e.run for e in ledger.entries] + [u.run for u in ledger.uploads])
    for run in runs:
        history = [s for e, s in zip(ledger.entries, ledger.history, strict=True) if e.run == run]
        told = f"run {run[:8]}: {_images(history, args)}; {_whole(ledger, args, run)}"
        console.print(told, soft_wrap=True)
    total = epsilon(ledger.history, args.delta, args.accountant)
    whole = client_noise.epsilon(ledger.rho(), args.delta)
    console.print(
        f"all together, at delta {args.delta:g}; attempts that were aborted count:\n"
        f"  one image more or less: epsilon {total:.4g} ({args.accountant})\n"
        f"  this client or zeros in its place: epsilon {whole:.4g} (zCDP)",
        soft_wrap=True,
    )
    result = {"epsilon": total, "client_epsilon": whole, "delta": args.delta,
              "accountant": args.accountant, "runs": len(runs)}  # fmt: skip
    command.write_json(args.json, "privacy-status", result)
    return 0


def _images(history: list[Steps], args: argparse.Namespace) -> str:
    count = sum(step.count for step in history)
    sigma = min((step.sigma for step in history), default=0.0)
    if not sigma:
        return f"{len(history)} rounds, {count} steps without dp"
    spent = epsilon(history, args.delta, args.accountant)
    return (
        f"{len(history)} rounds, {count} steps, noise multiplier {sigma:.4g}: epsilon {spent:.4g}"
    )


def _whole(ledger: Ledger, args: argparse.Namespace, run: str) -> str:
    sums = [upload for upload in ledger.uploads if upload.run == run]
    spent = client_noise.epsilon(ledger.rho(lambda other: other == run), args.delta)
    bounded = f"client epsilon {spent:.4g}" if all(u.rho is not None for u in sums) else "no noise"
    return f"{len(sums)} uploads, {bounded}"
