"""Every error a user or a peer can cause, in one tree.

    SecureFedPromptError                     exit code
    ├── ConfigError                          2   a setting, file or flag is wrong
    │   ├── KeyFileError                         key file missing, open to others, malformed
    │   ├── RosterError                          roster file malformed, entry unsigned or doubled
    │   ├── DataError                            data set empty, one class, corrupt image
    │   ├── ModelError                           weights missing or of an unsupported kind
    │   ├── PromptFileError                      prompt file does not fit the model or classes
    │   └── DiskError                            full, read-only, or held by somebody else
    ├── LinkError                            3   the connection
    │   ├── UnreachableError                 3
    │   ├── NotOnRosterError                 4   the server refused our key (ZAP 400)
    │   ├── WrongServerKeyError              5   the handshake never completes
    │   ├── PortInUseError                   6
    │   └── KeyInUseError                    14  another process takes part with our key
    ├── MismatchError                        7   model, classes, method or roster are not the run's
    │   └── RosterMismatchError                  the peer's roster is another
    ├── RunFailedError                       8   the run cannot go on
    │   └── TooFewClientsError               8
    ├── UpdateError                          9   an update may not be sent: NaN, wrong size
    │   ├── UpdateReusedError                    a second upload in one round
    │   └── BudgetError                      11  the privacy budget is spent
    ├── AuditError                           12  an audit log or a promise is broken
    │   └── UnfinishedLogError               13  kept so far, in a log that has no end
    └── ProtocolError                        10  a peer broke the protocol
        ├── CodecError                           bytes are not a message
        │   ├── TruncatedError
        │   ├── TrailingBytesError
        │   ├── UnknownVersionError
        │   ├── UnknownTypeError
        │   ├── TooLargeError
        │   └── FieldError                       a field is out of its domain
        ├── FloodError                           more than a round takes
        ├── UnexpectedMessageError               right form, wrong moment
        │   └── SecondUnmaskError                a second unmask request in a round
        ├── PlanError                            the plan contradicts itself
        │   ├── OverflowPlanError                a sum could leave the ring
        │   └── ParameterError                   no secure parameter set fits
        ├── HomomorphicError                     of the protections bfv and ckks
        │   ├── SecretKeyError                       a context holds a secret key
        │   ├── KeyMismatchError                     another key or context than registered
        │   ├── KeyLostError                         the key was in the memory of an earlier process
        │   ├── CiphertextError                      wrong count, size or parameter set
        │   └── DecryptionError                      what decrypts is not a sum: wrong key, swapped
        ├── SelectionError                       of the secure selection
        │   ├── PointError                           no usable curve point
        │   ├── SessionError                         a frame of another session
        │   ├── TweakError                           a frame replayed or out of order
        │   └── GarblingError                        tables altered, swapped or cut
        ├── TermsError                           a plan bends the run's terms, or they changed
        ├── PolicyError                          terms or plan are outside this client's policy
        │   └── AcceptanceError                      terms that the operator must accept by name
        ├── ReplayError                          (run, round) did not grow
        │   └── OpenedError                          a sum of this base was opened already
        ├── SignatureError
        ├── SealError                            a sealed box does not open
        ├── AdvertMismatchError                  an advert is missing, doubled or altered
        ├── SurvivorError                        survivor list not ours, too short, unsigned
        │   ├── IsolationError                       a list that, with others, would isolate a few
        │   └── ThresholdError                   fewer than t
        ├── SumError                             what came back is not the sum of what was sent
        └── BadShareError                        a share does not reconstruct; names the sender

Messages are one line: what was wrong, with the value, and what to do. They never hold secrets.
"""

from __future__ import annotations


class SecureFedPromptError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        told: what a peer may read in the place of the text, if that tells more than what it sent.
    """

    exit_code = 1
    told: str | None = None


class ConfigError(SecureFedPromptError):
    exit_code = 2


class KeyFileError(ConfigError):
    pass


class RosterError(ConfigError):
    pass


class DataError(ConfigError):
    pass


class ModelError(ConfigError):
    pass


class PromptFileError(ConfigError):
    pass


class DiskError(ConfigError):
    pass


class LinkError(SecureFedPromptError):
    exit_code = 3


class UnreachableError(LinkError):
    exit_code = 3


class NotOnRosterError(LinkError):
    exit_code = 4


class WrongServerKeyError(LinkError):
    exit_code = 5


class PortInUseError(LinkError):
    exit_code = 6


class KeyInUseError(LinkError):
    exit_code = 14


class MismatchError(SecureFedPromptError):
    exit_code = 7


class RosterMismatchError(MismatchError):
    pass


class RunFailedError(SecureFedPromptError):
    exit_code = 8


class TooFewClientsError(RunFailedError):
    pass


class UpdateError(SecureFedPromptError):
    exit_code = 9


class UpdateReusedError(UpdateError):
    pass


class BudgetError(UpdateError):
    exit_code = 11


class AuditError(SecureFedPromptError):
    exit_code = 12


class UnfinishedLogError(AuditError):
    exit_code = 13


class ProtocolError(SecureFedPromptError):
    exit_code = 10


class CodecError(ProtocolError):
    pass


class TruncatedError(CodecError):
    pass


class TrailingBytesError(CodecError):
    pass


class UnknownVersionError(CodecError):
    pass


class UnknownTypeError(CodecError):
    pass


class TooLargeError(CodecError):
    pass


class FieldError(CodecError):
    pass


class FloodError(ProtocolError):
    pass


class UnexpectedMessageError(ProtocolError):
    pass


class SecondUnmaskError(UnexpectedMessageError):
    pass


class PlanError(ProtocolError):
    pass


class OverflowPlanError(PlanError):
    pass


class ParameterError(PlanError):
    pass


class SumError(ProtocolError):
    pass


class HomomorphicError(ProtocolError):
    told = ""  # what a sum opens to is not for the server, not even in an error


class SecretKeyError(HomomorphicError):
    pass


class KeyMismatchError(HomomorphicError):
    pass


class KeyLostError(HomomorphicError):
    pass


class CiphertextError(HomomorphicError):
    pass


class DecryptionError(HomomorphicError):
    pass


class SelectionError(ProtocolError):
    told = ""  # nor what an outcome does


class PointError(SelectionError):
    pass


class SessionError(SelectionError):
    pass


class TweakError(SelectionError):
    pass


class GarblingError(SelectionError):
    pass


class TermsError(ProtocolError):
    pass


class PolicyError(ProtocolError):
    pass


class AcceptanceError(PolicyError):
    told = "its operator has to accept these terms first, as its own log says"


class ReplayError(ProtocolError):
    pass


class OpenedError(ReplayError):
    pass


class SignatureError(ProtocolError):
    pass


class SealError(ProtocolError):
    pass


class AdvertMismatchError(ProtocolError):
    pass


class SurvivorError(ProtocolError):
    pass


class IsolationError(SurvivorError):
    told = (
        "beside earlier sums of nearly the same prompt this one would single somebody out: begin "
        "from another prompt (other words in init, or another seed), or with the same clients"
    )


class ThresholdError(SurvivorError):
    pass


class BadShareError(ProtocolError):
    """A reconstructed secret does not match its commitment.

    Attributes:
        owner: whose shares do not give what it committed to, if there were enough of them to
            rule out that a responder lies; else empty.
    """

    def __init__(self, message: str, owner: str = "") -> None:
        super().__init__(message)
        self.owner = owner
