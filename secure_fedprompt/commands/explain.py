"""``secure-fedprompt explain``: what a protection costs and promises, before anything runs."""

from __future__ import annotations

import argparse
import bisect
import math

import msgspec
from rich.console import Console

from secure_fedprompt.host import command
from secure_fedprompt.protocol import client_noise, fixedpoint, homomorphic, masking
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.errors import ConfigError, PlanError
from secure_fedprompt.protocol.homomorphic import Parameters
from secure_fedprompt.protocol.layout import Layout, TensorSpec, total_size
from secure_fedprompt.protocol.packing import Packing
from secure_fedprompt.protocol.protections import tolerated_colluders
from secure_fedprompt.protocol.selection.task import Task
from secure_fedprompt.server.settings import (
    ServerSettings,
    bits_of,
    check_settings,
    noise_of,
    quorum_of,
    selection_of,
    weight_of,
)

_USED = {"protection", "clients", "clip", "weights", "max_weight", "max_seen", "ring_bits",
         "metrics", "flood_bits", "threshold", "method", "selection", "selection_scope",
         "selection_keep", "helper", "fedmgp", "dp_noise", "dp_clip", "dp_colluders",
         "min_clients", "rounds", "graph", "max_dropout", "max_corruption"}  # fmt: skip
_DELTA = 1e-5
_FAR = 4.0  # a clip this many times above or below the norm of updates is far from it
_FEWEST, _MANY = 3, 10_000_000  # clients that are looked at
_SIGNED = 64 + 32 + 30  # signature, key digest and header of an upload
_SEED = 100  # bytes of a fresh ciphertext beside its polynomial
_DENSE = 7.56  # bytes that SEAL's compression leaves of a 54-bit coefficient, measured
Rows = dict[str, str]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt explain",
        "Print parameter set, bytes and expected error of a protection, from a server's settings; "
        "clients counts those on the roster (10 if it is 0). Nothing is sent and no data is read.",
        "  secure-fedprompt explain --protection ckks --dim 8192 --clients 50\n"
        "  secure-fedprompt explain --protection bfv --dim 8192 --clients 10 --precision 1e-6\n"
        "  secure-fedprompt explain --method fedmgp --weights uniform --selection secure \\\n"
        "      --selection-scope federation --clients 10\n"
        "  # is client noise of any use? the norm of updates as 'simulate' or a client prints it\n"
        "  secure-fedprompt explain --dp-noise 1 --dp-clip 0.01 --update-norm 0.007 \\\n"
        "      --metrics off --clients 500 --rounds 10 --dim 2048\n"
        "  secure-fedprompt explain --config server.toml --dim 8192",
    )
    parser.add_argument("--dim", type=int, default=8192, metavar="N", help="prompt values uploaded")
    parser.add_argument(
        "--precision", type=float, default=0.0, metavar="STEP",
        help="refuse settings under which a client's value is rounded to a coarser step",
    )  # fmt: skip
    parser.add_argument(
        "--update-norm", type=float, default=0.0, metavar="NORM",
        help="L2 norm of a client's update, to compare with --dp-noise and --dp-clip",
    )  # fmt: skip
    skip = frozenset(set(ServerSettings.__struct_fields__) - _USED)
    command.add_flags(parser, ServerSettings, skip=skip)
    args = parser.parse_args(argv)
    return command.guard(lambda: _show(args), args)


def _show(args: argparse.Namespace) -> int:
    settings = command.load(ServerSettings, args)
    try:
        clients = settings.clients or 10
        rows, figures = describe(settings, args.dim, clients, args.precision)
        if settings.dp_noise:
            _usefulness(rows, figures, settings, args.dim, clients, args.update_norm)
        elif args.update_norm:
            raise ConfigError(f"--update-norm {args.update_norm:g}: compares with --dp-noise")
    except PlanError as error:
        raise ConfigError(str(error)) from None
    console = Console(highlight=False)
    for name, text in rows.items():
        console.print(f"[bold]{name:11}[/] {text}", soft_wrap=True)
    command.write_json(args.json, "explain", figures)
    return 0


def describe(
    settings: ServerSettings, dim: int, clients: int, precision: float
) -> tuple[Rows, dict[str, float]]:
    """Lines for people, and figures for programs.

    Raises:
        ConfigError: the step is coarser than ``precision``, or ``dim`` is no size.
        PlanError: no layout or parameter set fits; says why.
    """
    if dim < 1:
        raise ConfigError(f"dim = {dim}: at least 1 value")
    if settings.dp_noise:
        check_settings(settings)
    noise = noise_of(settings, clients)
    weight, bits = weight_of(settings), bits_of(settings, clients)
    layout = fixedpoint.size_layout(
        (TensorSpec("prompt", (dim,)),), clients, clip=settings.clip, max_weight=weight,
        max_seen=settings.max_seen, ring_bits=bits,
        metrics=settings.metrics == "rounds", noise=noise.room,
    )  # fmt: skip
    step = 2.0 ** -layout[0].frac
    if precision and step > precision:
        short = math.ceil(math.log2(step / precision))
        raise ConfigError(
            f"precision = {precision:g}: {bits}-bit sums of {clients} clients with "
            f"clip {settings.clip:g} and weights up to {weight} have a step of {step:.2g}, "
            f"{short} bits too coarse; use more ring_bits (at most 32), weights = 'uniform', or a "
            "smaller clip or max_weight"
        )
    facts = settings.facts
    rows: Rows = {"protection": facts.title}
    figures = {"step": step, "values": float(total_size(layout))}
    if facts.encrypted:
        parameters = homomorphic.choose(settings.protection, clients, settings.flood_bits)
        _encrypted(rows, figures, settings, layout, parameters, dim)
    else:
        up = fixedpoint.wire_size(layout) if facts.masked else 8 * total_size(layout)
        figures |= {"bytes_up": up, "bytes_down": up if facts.masked else 4.0 * dim}
        if facts.masked and settings.graph == "regular":
            _regular(rows, figures, settings, clients)
        elif facts.masked:
            t = quorum_of(settings, clients)
            rows["threshold"] = (
                f"{clients} clients, t = {t}: safe against a dishonest server with "
                f"c = {tolerated_colluders(clients, t)} colluding clients"
            )
    rows["bytes up"] = (
        f"{figures['bytes_up']:,.0f} for the vector of each client and round, "
        f"{figures['bytes_up'] / dim:.2f} per prompt value (keys and signatures come on top)"
    )
    what = "the sum, from which clients compute the prompt" if facts.masked else "prompt and sum"
    rows["bytes down"] = f"{figures['bytes_down']:,.0f} for {what}"
    if settings.dp_noise:
        _noise(rows, figures, settings, layout, noise)
    if settings.selection == "secure":
        _selection(rows, figures, settings, clients)
    figures["rms_error"] = step / math.sqrt(6 * clients)
    rows["error"] = (
        f"clients round to multiples of {step:.2g}; an average over {clients} clients of weight 1 "
        f"is off by {figures['rms_error']:.2g} (rms) and never by more than {step:.2g}, larger "
        "weights divide that"
    )
    return rows, figures


def _regular(rows: Rows, figures: dict[str, float], settings: ServerSettings, clients: int) -> None:
    dropout, corruption = settings.max_dropout, settings.max_corruption
    k, t = masking.choose_degree(clients, dropout=dropout, corruption=corruption)
    figures |= {"degree": k, "threshold": t}
    rows["graph"] = (
        f"each of {clients:,} clients is paired with k = {k}, of whom t = {t} with itself open a "
        f"mask: safe against an honest-but-curious server with {corruption:.0%} of the clients "
        f"colluding, and done if {dropout:.0%} vanish (failures below 2^-40 and 2^-30); "
        f"{max(1, 2 * t - k - 1)} colluders among a client's neighbours and a dishonest server "
        "could open it"
    )


def _noise(
    rows: Rows, figures: dict[str, float], settings: ServerSettings, layout: Layout, noise: Noise
) -> None:
    noise.check(noise.honest)
    rho = settings.rounds * client_noise.concentrated(noise, layout)
    figures |= {"epsilon": client_noise.epsilon(rho, _DELTA), "delta": _DELTA}
    quorum = quorum_of(settings, settings.clients or 10)
    rows["privacy"] = (
        f"epsilon {figures['epsilon']:.4g} at delta {_DELTA:g} after {settings.rounds} rounds, for "
        f"one client's whole part in all of them or zeros in its place (rho {rho:.3g} zCDP), if "
        f"{noise.honest} clients of every sum add their noise: a quorum of {quorum} less "
        f"{quorum - noise.honest} that can subtract theirs"
    )


def _usefulness(
    rows: Rows,
    figures: dict[str, float],
    settings: ServerSettings,
    dim: int,
    clients: int,
    update_norm: float,
) -> None:
    """Whether an average says more than its noise: both as L2 norms over the prompt's values.

    Every client adds a share, so that n clients, of whom ``honest`` are counted on, leave noise of
    z C / sqrt(honest n) in each value of their average. Averaged updates have the norm of one at
    most: that of updates that all point the same way.
    """
    if update_norm < 0 or not math.isfinite(update_norm):
        raise ConfigError(f"--update-norm {update_norm:g}: must be positive")
    clip, signal = settings.dp_clip, min(update_norm or settings.dp_clip, settings.dp_clip)
    noise = _noise_norm(settings, dim, clients)
    least = _break_even(settings, dim, signal)
    of = f"updates of norm {update_norm:g}" if update_norm else "updates as long as dp_clip"
    figures |= {"noise_norm": noise, "signal_norm": signal, "signal_to_noise": signal / noise}
    figures["break_even_clients"] = float(least or math.inf)
    rows["useful"] = (
        f"the noise in an average over {clients} clients has norm {noise:.2g}, {noise / clip:.2g} "
        f"times dp_clip; {of} leave at most {signal:.2g}: signal to noise {signal / noise:.2g} in "
        f"a round, and sqrt({settings.rounds}) times that over all rounds if they pull one way. "
        f"They meet at {f'{least:,} clients' if least else f'more than {_MANY:,} clients'}"
    )
    if not update_norm:
        rows["dp_clip"] = (
            "the median norm of updates is a good choice. 'secure-fedprompt simulate' prints it, "
            "for images that need no protection, under the same settings; give it as --update-norm"
        )
    elif not update_norm / _FAR <= clip <= update_norm * _FAR:
        fault = (
            f"{clip / update_norm:.3g} times the norm of updates: all noise is for the clip, so it "
            "drowns them"
            if clip > update_norm
            else f"{clip / update_norm:.2g} of the norm of updates: most of them is cut off"
        )
        rows["warning"] = f"dp_clip = {clip:g} is {fault}; set dp_clip near {update_norm:.2g}"
    elif signal < noise:
        rows["warning"] = (
            "an average is mostly noise: use more clients, fewer prompt values, or less noise"
        )


def _noise_norm(settings: ServerSettings, dim: int, clients: int) -> float:
    noise = noise_of(settings, clients)
    return noise.multiplier * noise.clip * math.sqrt(dim / (noise.honest * clients))


def _break_even(settings: ServerSettings, dim: int, signal: float) -> int | None:
    """The smallest number of clients whose average has no more noise than signal, if any."""
    free = msgspec.structs.replace(settings, threshold=0)

    def enough(n: int) -> bool:
        return _noise_norm(free, dim, n) <= signal

    low, high = _FEWEST, _FEWEST
    while not enough(high):
        low, high = high, 2 * high
        if high > _MANY:
            return None
    return bisect.bisect_left(range(high), True, low, high, key=enough)


def _selection(
    rows: Rows, figures: dict[str, float], settings: ServerSettings, clients: int
) -> None:
    check_settings(settings)
    selection = selection_of(settings, clients, settings.helper or "elected")
    selection.check(clients)
    task = Task(selection, tuple(str(i) for i in range(clients)))
    instances = selection.modalities * (1 if selection.federation else clients)
    figures["selection_bytes"] = instances * task.circuit.size
    rows["selection"] = (
        f"{instances} times {task.circuit}; {figures['selection_bytes']:,.0f} bytes between server "
        "and helper in a round, and 4,200 to begin"
    )
    rows["leaks"] = (
        "to server and helper: nothing, if they do not collude; how many clients fill each slot is "
        f"in the sum, slots with fewer than {selection.fillers} stay closed"
        if selection.federation
        else "to server and helper: nothing, if they do not collude"
    )


def _encrypted(
    rows: Rows,
    figures: dict[str, float],
    settings: ServerSettings,
    layout: Layout,
    parameters: Parameters,
    dim: int,
) -> None:
    scheme = homomorphic.scheme(settings.protection, parameters)
    packing = Packing.of(layout, scheme.limit, parameters.clients)
    count = -(-packing.slots // scheme.slots)
    prime = homomorphic.SETS[parameters.degree]
    what = (
        f"plaintext prime of {parameters.plain_bits} bits"
        if parameters.plain_bits
        else f"scale 2^{parameters.scale_bits}"
    )
    rows["set"] = (
        f"degree {parameters.degree}, one prime of {prime} bits, {what}, no relinearisation or "
        "Galois keys: 128-bit security, checked by SEAL (TC128)"
    )
    place = f"{packing.digit} bits at a time above them" if packing.digit else "in own slots"
    rows["packing"] = (
        f"{packing.values:,} values, {packing.stack} in a slot, {packing.counters} counters "
        f"{place}: {count} ciphertexts of {scheme.slots} slots"
    )
    rows["assumes"] = settings.facts.assumes
    one = parameters.degree * (_DENSE if prime == min(homomorphic.SETS.values()) else 8.02)
    figures["bytes_up"] = count * (one + _SEED) + _SIGNED
    figures["bytes_down"] = 2 * count * one + 4.0 * dim
    if settings.facts.approximate:
        figures["flooding_bits"] = homomorphic.flooding_bits(parameters)
        figures["failure_bits"] = homomorphic.failure_bits(parameters)
        rows["flooding"] = (
            "after decryption, uniform in a quarter step, then rounded: values on the integers "
            "(all honest ones) come out exact, each wrong with probability below "
            f"2^-{min(figures['failure_bits'], 1000):.0f}. For a value off the integers the "
            f"statistical distance is 2^-{figures['flooding_bits']:.1f}, which bounds nothing over "
            "a whole vector of such values"
        )
