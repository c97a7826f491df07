"""PromptFL + FT: each client trains the final global prompt once more on its own images.

The personalisation baseline of the FedOTP and FedMGP papers.
"""

from __future__ import annotations

from secure_fedprompt.clients.methods.promptfl import PromptFL


class PromptFLFineTuned(PromptFL):
    name = "promptfl-ft"
    fine_tunes = True
