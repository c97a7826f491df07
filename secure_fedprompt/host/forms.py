"""The JSON that commands write: its forms, their keys, and what a key means, the same in all.

``docs/json.md`` shows ``tables()``; a key that is not here cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERSION = 1
MEANING = {
    "accountant": "that counted epsilon: prv or rdp",
    "accuracy": "share of right answers, 0 to 1; in a report a list by round",
    "accuracy_after": "of the last prompt that was counted",
    "accuracy_before": "of the first",
    "at": "when a round ended, or a run began, seconds since 1970",
    "audit": "an object of the form audit-result, or null",
    "break_even_clients": "from how many on noise is no longer than the updates; null if never",
    "bytes": "frames' sizes in sum: of a round by direction and client, of two logs a pair",
    "bytes_down": "from the server, for prompt and sum, per client and round",
    "bytes_down_per_client": "from the server, whole run",
    "bytes_up": "to the server, for the vector, per client and round",
    "bytes_up_per_client": "to the server, whole run",
    "chapters": "names of those that were measured, or kept",
    "checked": "who has said that the sum is what was sent; under masks, in the round that follows",
    "checks": "what came of each check, by its name",
    "classes": "the likeliest names with their probabilities",
    "clear": "fields that can be read",
    "client_epsilon": "for this client or zeros in its place",
    "clients": "how many",
    "cohort": "names of the clients that a round was planned with",
    "connects_as": "fingerprint of the key for connections",
    "contributors": "clients in the sum",
    "degree": "k, on a regular graph",
    "delta": "that epsilon is at",
    "direction": "in or out, as the owner of the log sees it",
    "dropouts": "round, who, what",
    "dropped": "who is missing in the sum, with the stage in which it was lost",
    "entry": "path of the public roster entry",
    "epsilon": "for one image more or less, or in explain for one client or zeros in its place",
    "epsilon_by_accountant": "the same noise, counted in two ways",
    "epsilon_by_client": "what each has spent",
    "error": "why there is no result",
    "events": "what else happened: how often, by kind",
    "expected": "bytes that the plans allow for; null if that is not known",
    "facts": "settings in words",
    "failed": "what could not be measured, a sentence each",
    "failure_bits": "k, where a value comes out wrong with probability below 2^-k",
    "faults": "clients that broke a rule, with the error",
    "findings": "list of findings",
    "fingerprint": "of a public signing key, as people compare it",
    "finished": "whether the audited log has an end",
    "flooding_bits": "k of the statistical distance 2^-k of flooding, for one value",
    "format": "secure-fedprompt/FORM/VERSION; further keys may come without a new version",
    "folder": "of a run",
    "frames": "how many messages; of two logs a pair",
    "hidden": "protected fields, with what protects them",
    "image": "path",
    "images": "how many",
    "check": "name of a check",
    "kept": "whether no check failed",
    "key": "path of the secret key",
    "labels": "of the rounds, in the order of all lists in the report",
    "learned": "who learned what, in sentences",
    "outcomes": "rounds that are over, by outcome",
    "losses": "times that a client of a cohort was not in its sum",
    "learning_round": "counted from 1; the one after the last is the final evaluation",
    "learning_rounds": "how many are wanted",
    "level": "pass, fail, open, warning or note",
    "logs": "owners of the logs, the audited one first",
    "loss": "mean cross-entropy",
    "macro_f1": "mean of the classes' F1 scores",
    "members": "list of members",
    "method": "of federated prompt learning",
    "metrics": "accuracy, zero_shot, loss, weight and contributors of a sum, where it tells them",
    "name": "on the roster",
    "noise_multiplier": "sigma of DP-SGD",
    "noise_norm": "of the noise in an average",
    "opened": "metrics by learning round, of sums that this client has checked",
    "out": "path of the folder of figures",
    "outcome": "done or aborted",
    "per_class": "accuracy by class name",
    "predictions": "list of predictions",
    "prompt": "path of the prompt file",
    "protections": "of the two logs",
    "protection": "masks, bfv, ckks or none",
    "rate": "probability with which an image is in a batch",
    "reason": "why a round was aborted, or empty",
    "rms_error": "of an average, from rounding",
    "role": "server, client or helper",
    "roster_digest": "that must be the same everywhere",
    "round": "number of an attempt, never used twice in a run",
    "rounds": "list of rounds, with attempts that were aborted, not those that a kill cut off",
    "rounds_done": "sums that a client contributed to, the final evaluation's included; of runs, "
    "learning rounds",
    "run": "id of the run, hexadecimal",
    "run_dir": "folder of everything",
    "run_folders": "list of runs",
    "runs": "how many runs; in audit-diff the two that are compared",
    "seconds": "by stage; of a demo, all of it; of a report, stage to list by round",
    "selection_bytes": "between server and helper in a round",
    "selections": "how many a helper evaluated",
    "signal_norm": "of an average of updates, at most",
    "signal_to_noise": "of an average",
    "spoken": "80 bits of a public key as words for the phone",
    "spent": "what dp has cost, in sentences",
    "state": "finished, failed or unfinished",
    "step": "size of a quantisation step",
    "steps": "of DP-SGD in sum",
    "subtitle": "of a report",
    "text": "of a finding",
    "threshold": "t: how many of a client and its k neighbours open one of its masks",
    "traffic": "list by type and direction; of a report by direction, type and round",
    "type": "of a message",
    "update_norm": "quantiles of the clients' L2 norms: low 10%, median, high 90%",
    "values": "numbers in an upload",
    "verdict": "the audit's last line",
    "verified": "whether the final prompt follows from sums checked by this client or c + 1 others",
    "weight": "sum of the clients' weights",
    "worse": "figures that got worse since those they were compared with, a sentence each",
    "where": "log and record or round that a finding is about",
    "zero_shot": 'accuracy of "a photo of a NAME.", nothing trained',
}
_RUN = (
    "run", "method", "protection", "learning_rounds", "rounds", "accuracy_before",
    "accuracy_after", "zero_shot", "bytes_up_per_client", "bytes_down_per_client", "prompt",
)  # fmt: skip
FORMS: dict[str, tuple[str, ...]] = {
    "run": _RUN,
    "demo": (
        *_RUN, "seconds", "run_dir", "clients", "accuracy", "epsilon_by_client", "delta",
        "accountant",
    ),
    "simulation": (*_RUN, "update_norm"),
    "runs": ("run_folders",),
    "watch": ("method", "protection", "learning_rounds", "rounds"),
    "metrics": (
        "rounds_done", "learning_rounds", "outcomes", "clients", "losses", "bytes", "seconds",
        "events",
    ),
    "client": ("name", "run", "rounds_done", "prompt", "verified", "opened"),
    "helper": ("name", "run", "selections"),
    "init": ("members",),
    "join": ("members", "entry"),
    "keygen": ("name", "role", "key", "entry", "fingerprint", "connects_as"),
    "roster": ("roster_digest", "members"),
    "check": ("checks",),
    "evaluate": ("images", "accuracy", "zero_shot", "macro_f1", "loss", "per_class"),
    "predict": ("predictions",),
    "explain": (
        "step", "values", "bytes_up", "bytes_down", "rms_error", "epsilon", "delta", "noise_norm",
        "signal_norm", "signal_to_noise", "break_even_clients", "selection_bytes",
        "flooding_bits", "failure_bits", "degree", "threshold",
    ),
    "bench": ("out", "chapters", "failed", "worse"),
    "privacy-plan": (
        "noise_multiplier", "rate", "steps", "delta", "accountant", "epsilon",
        "epsilon_by_accountant",
    ),
    "privacy-status": ("epsilon", "client_epsilon", "delta", "accountant", "runs"),
    "audit-result": (
        "verdict", "kept", "finished", "run", "logs", "protection", "traffic", "checks", "findings",
    ),
    "audit-diff": ("runs", "protections", "traffic", "checks"),
    "report": (
        "run", "method", "protection", "subtitle", "labels", "facts", "learned", "accuracy",
        "zero_shot", "traffic", "seconds", "dropouts", "spent", "audit",
    ),
}  # fmt: skip
ROWS: dict[str, tuple[str, ...]] = {  # of lists of objects, by the key that holds them
    "rounds": (
        "round", "learning_round", "outcome", "reason", "cohort", "dropped", "checked", "faults",
        "metrics", "seconds", "bytes", "at",
    ),
    "run_folders": (
        "folder", "run", "at", "method", "protection", "learning_rounds", "rounds_done", "accuracy",
        "zero_shot", "bytes_up", "state", "verdict",
    ),
    "members": ("name", "role", "fingerprint", "connects_as", "spoken"),
    "predictions": ("image", "classes", "error"),
    "traffic": ("type", "direction", "frames", "bytes", "expected", "clear", "hidden"),
    "findings": ("level", "check", "where", "text"),
}  # fmt: skip


def formed(form: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with its format in front.

    Raises:
        KeyError: it has a key that its form has not.
    """
    _known(form, FORMS[form], result)
    for name, keys in ROWS.items():
        rows = result.get(name)
        for row in rows if isinstance(rows, list) else ():
            _known(name, keys, row)
    return {"format": f"secure-fedprompt/{form}/{VERSION}", **result}


def _known(what: str, keys: tuple[str, ...], found: Mapping[str, Any]) -> None:
    if extra := sorted(set(found) - set(keys)):
        raise KeyError(f"{what} has no key {extra[0]!r}")


def tables() -> str:
    """Forms, rows and words, as Markdown."""
    head = "| {} | keys |\n|---|---|\n"
    parts = [head.format("form")]
    parts += [f"| `{form}` | {_listed(keys)} |\n" for form, keys in FORMS.items()]
    parts += ["\n", head.format("list")]
    parts += [f"| `{name}` | {_listed(keys)} |\n" for name, keys in ROWS.items()]
    parts += ["\n| key | meaning |\n|---|---|\n"]
    parts += [f"| `{key}` | {text} |\n" for key, text in sorted(MEANING.items())]
    return "".join(parts)


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
