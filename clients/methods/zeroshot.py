"""Zero-shot CLIP: "a photo of a NAME.", nothing trained (Radford et al., ICML 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, array, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings


class ZeroShot(PromptFL):
    """Uploads an unchanged prompt, so that the protocol has a vector to carry."""

    name = "zeroshot"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        words = backbone.embed(backbone.words("a photo of a"))
        self.ctx = nn.Parameter(words[None].float(), requires_grad=False)
        self.shared = {"ctx": self.ctx}
        self.tokens = backbone.prompt_tokens(class_names, len(words))
        self._words = array(self.ctx)

    def parameters(self) -> list[nn.Parameter]:
        return []

    def load(self, tensors: Mapping[str, Array]) -> None:
        put(self.ctx, self._words)
