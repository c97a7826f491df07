"""What each method is, to everybody but its trainer: facts that need no torch.

A method of another package declares its row as the entry point ``secure_fedprompt.methods``; see
docs/methods.md. Only then, and on a client only if its policy names the method, it is in the table.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

_OURS = "secure_fedprompt.clients.methods."


@dataclass(frozen=True)
class MethodFacts:
    """A row.

    Attributes:
        name: as in settings, plans and policies.
        implementation: "module:class", a ``Method``; imported by clients only.
        source: where it is published.
        weighted: whether updates may be weighted by image counts.
        hidden: whether its aggregate hides the single update; if not, it runs without protection
            only, since any other would promise too much.
        shares: whether an update says anything; updates of zeros may be summed again and again.
        sampled: whether it has a loss of single images, for DP-SGD.
        grouped: whether it has groups of which a client or a helper selects some.
        chained: whether the sum of a round gives the next global prompt, which each client can
            compute; if not, the server says what it is, and nobody can check it.
        own_start: whether clients know the starting prompt, from settings and model; if not, the
            server says what it is, and any two runs may begin from nearly the same.
    """

    name: str
    implementation: str
    source: str
    weighted: bool = True
    hidden: bool = True
    shares: bool = True
    sampled: bool = False
    grouped: bool = False
    chained: bool = True
    own_start: bool = True


METHODS: dict[str, MethodFacts] = {
    row.name: row
    for row in (
        MethodFacts("promptfl", _OURS + "promptfl:PromptFL", "Guo et al., TMC 2024", sampled=True),
        MethodFacts("fedotp", _OURS + "fedotp:FedOTP", "Li et al., CVPR 2024", sampled=True),
        MethodFacts("fedmgp", _OURS + "fedmgp:FedMGP", "Bo et al., NeurIPS 2025",
                    weighted=False, sampled=True, grouped=True),
        MethodFacts("zeroshot", _OURS + "zeroshot:ZeroShot", "Radford et al., ICML 2021",
                    shares=False),
        MethodFacts("coop", _OURS + "coop:CoOp", "Zhou et al., IJCV 2022", shares=False,
                    sampled=True),
        MethodFacts("promptfl-ft", _OURS + "promptfl_ft:PromptFLFineTuned",
                    "a baseline of the FedOTP and FedMGP papers"),
        MethodFacts("fedprox", _OURS + "fedprox:FedProx", "Li et al., MLSys 2020"),
        MethodFacts("fedper", _OURS + "fedper:FedPer", "Arivazhagan et al., 2019", sampled=True),
        MethodFacts("fedamp", _OURS + "fedamp:FedAMP", "Huang et al., AAAI 2021", hidden=False),
        MethodFacts("promptfolio", _OURS + "promptfolio:PromptFolio", "Pan et al., NeurIPS 2024"),
        MethodFacts("fedpgp", _OURS + "fedpgp:FedPGP", "Cui et al., ICML 2024"),
        MethodFacts("dpfpl", _OURS + "dpfpl:DPFPL", "Tran et al., ICLR 2025", sampled=True),
        MethodFacts("pfedprompt", _OURS + "pfedprompt:PFedPrompt", "Guo et al., WWW 2023"),
        MethodFacts("fedtpg", _OURS + "fedtpg:FedTPG", "Qiu et al., ICLR 2024"),
        MethodFacts("linear", _OURS + "linear:LinearHead", "a linear head, from class names"),
        MethodFacts("linear-scratch", _OURS + "linear:ScratchHead", "a linear head, from zero"),
        MethodFacts("finetune", _OURS + "whole:FineTuned", "image tower and head, fine-tuned"),
        MethodFacts("scratch", _OURS + "whole:Scratch", "image tower and head, from nothing"),
    )
}  # fmt: skip
FOREIGN: dict[str, MethodFacts] = {  # what other programs train, through us
    row.name: row
    for row in (
        MethodFacts("flower", "", "a Flower app whose strategy keeps the average",
                    own_start=False),
        MethodFacts("flower-optimizer", "", "a Flower app whose strategy changes the average",
                    chained=False, own_start=False),
    )
}  # fmt: skip
_UNKNOWN = MethodFacts("", "", "", weighted=False, hidden=False)  # promises least


def unknown_method(name: str) -> str:
    """What to say of a method that is not in the table."""
    close = difflib.get_close_matches(name, METHODS, n=1)
    advice = f"; did you mean {close[0]!r}?" if close else ""
    return f"method = {name!r}: must be one of {', '.join(METHODS)}{advice}"


def method_facts(name: str) -> MethodFacts:
    """The row of a name that a peer may have made up: who builds a method refuses it by name."""
    return METHODS.get(name) or FOREIGN.get(name, _UNKNOWN)
