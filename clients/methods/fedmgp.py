"""FedMGP: several groups of paired text and visual prompts, of which each round shares a few.

Bo, Sun, Wang, Zhang and Li, "FedMGP: Personalized Federated Learning with Multi-Group Text-Visual
Prompts" (NeurIPS 2025). A client trains m groups, kept apart by a diversity term. In a round it
sends the s groups whose prompts are closest to the global slots, drawn by softmax(similarity / tau)
without replacement, text and visual apart. Slot k becomes the mean of what clients sent for it, and
replaces that group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from secure_fedprompt.clients import vision
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Array,
    Arrays,
    Batch,
    Method,
    Shared,
    array,
    parameter,
    put,
)
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.selection.shares import Keys, integer_keys, order
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.settings import MethodSettings

TEMPLATE = "a photo of a"
_TEXT_NOISE = 0.01
_VISUAL_STD = 0.02


class FedMGP(Method):
    """See the module.

    Attributes:
        prompts: by modality, (m, l, W) with the text tower's or the image tower's width.
        slots: by modality, the global (s, l, W).
        choice: by modality, which group was sent for each slot in ``sent``, a learning round; fewer
            than there are slots if a selection chose fewer.
    """

    name = "fedmgp"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone, self.options = backbone, settings.fedmgp
        o, ids = self.options, backbone.words(TEMPLATE)
        self.trained = [m for m in ("text", "visual") if o.modality in ("both", _NAMES[m])]
        self.slot_count = o.groups if o.rule == "all" else o.slots
        self.prompts: dict[str, nn.Parameter] = {}
        words = array(backbone.embed(ids))[: o.length]
        starts = {"text": np.zeros((o.groups, o.length, backbone.width))}
        if "visual" in self.trained:
            starts["visual"] = np.zeros((o.groups, o.length, vision.visual_width(backbone)))
        for group in range(o.groups):
            rng = np.random.default_rng([settings.seed, group])
            text = rng.standard_normal((o.length, backbone.width))
            worded = o.length <= len(words)  # longer prompts have no words in them, as released
            text = words + _TEXT_NOISE * text if worded else backbone.word_scale * text
            starts["text"][group] = text
            if "visual" in self.trained:
                shape = starts["visual"][group].shape
                starts["visual"][group] = _VISUAL_STD * rng.standard_normal(shape)
        for modality in self.trained:
            self.prompts[modality] = parameter(starts[modality].astype(np.float32), backbone)
        shapes = {m: (self.slot_count, *p.shape[1:]) for m, p in self.prompts.items()}
        self.slots = {m: np.zeros(shape, np.float32) for m, shape in shapes.items()}
        self.choice: dict[str, NDArray[np.int64]] = {}
        self.sent = self.learning_round = 0
        self.needs = "tokens" if "visual" in self.trained else "features"
        self.tokens = backbone.prompt_tokens(class_names, o.length, behind=ids[o.length :])
        self._fixed_text = backbone.zero_shot_features(class_names, TEMPLATE)[None]

    # -- rounds ----------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        return list(self.prompts.values())

    def uploaded(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(m, tuple(slots.shape)) for m, slots in self.slots.items())

    def state(self) -> Arrays:
        return {m: slots.copy() for m, slots in self.slots.items()}

    def load(self, tensors: Mapping[str, Array]) -> None:
        for modality in self.slots:
            self.slots[modality] = np.array(tensors[modality], np.float32)

    def adopt(self, tensors: Mapping[str, Array]) -> None:
        self.load(tensors)
        self.prompts = {m: parameter(slots, self.backbone) for m, slots in self.slots.items()}

    def begin(self, tensors: Mapping[str, Array], learning_round: int) -> None:
        self.load(tensors)
        if self.choice and learning_round > self.sent:
            for modality, chosen in self.choice.items():
                rows = torch.from_numpy(chosen).to(self.prompts[modality].device)
                filled = torch.from_numpy(self.slots[modality][: len(chosen)]).to(rows.device)
                with torch.no_grad():
                    self.prompts[modality][rows] = filled
        self.choice, self.learning_round = {}, learning_round

    def selection_keys(self, rng: np.random.Generator) -> Keys:
        similarity = [
            slot_similarity(array(prompts), self.slots[m]) for m, prompts in self.prompts.items()
        ]
        o = self.options
        return integer_keys(np.stack(similarity), o.tau, rng, paired=o.pairing == "together")

    def contribution(self, rng: np.random.Generator, choice: Choice | None = None) -> Arrays:
        """The chosen prompts in slot order, and remember which. Slots that a ``choice`` leaves open
        keep their global value."""
        o, chosen = self.options, choice
        if chosen is not None:
            pass
        elif o.rule in ("fixed", "all"):
            chosen = (np.arange(self.slot_count),) * len(self.prompts)
        elif o.rule == "random" or self.learning_round == 1:  # the same for text and visual
            chosen = (rng.permutation(o.groups)[: self.slot_count],) * len(self.prompts)
        else:
            chosen = tuple(best[: self.slot_count] for best in order(self.selection_keys(rng)))
        self.choice = dict(zip(self.prompts, chosen, strict=True))
        self.sent = self.learning_round
        sent = self.state()
        for modality, groups in self.choice.items():
            sent[modality][: len(groups)] = array(self.prompts[modality])[groups]
        return sent

    def private(self) -> Arrays:
        kept = {f"groups.{m}": array(p) for m, p in self.prompts.items()}
        kept |= {f"choice.{m}": c.astype(np.float32) for m, c in self.choice.items()}
        return {**kept, "sent": np.array([self.sent], np.float32)}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        for modality, prompts in self.prompts.items():
            put(prompts, arrays[f"groups.{modality}"])
        found = {m: arrays[f"choice.{m}"] for m in self.prompts if f"choice.{m}" in arrays}
        self.choice = {m: c.astype(np.int64) for m, c in found.items()}
        self.sent = int(arrays["sent"][0])

    # -- features --------------------------------------------------------------------------------

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Text (m or 1, C, E) and image (m or 1, B, E) features, normalised."""
        text, images = self._fixed_text, batch.images[None]
        if "text" in self.prompts:
            text = self.backbone.text_features(self.prompts["text"], self.tokens)
        if "visual" in self.prompts:
            images = vision.prompted_features(self.backbone, batch.images, self.prompts["visual"])
        return text, images

    def group_logits(self, text: Tensor, images: Tensor) -> Tensor:
        """(m, B, C)."""
        return self.backbone.scale * images @ text.transpose(1, 2)

    def loss(self, batch: Batch) -> Tensor:
        text, images = self.features(batch)
        logits = self.group_logits(text, images)
        labels = batch.labels.expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        o = self.options
        if not o.diversity_weight or o.groups == 1:
            return loss
        terms = [
            likeness(features, o.diversity, o.compat)
            for modality, features in (("text", text), ("visual", images))
            if modality in self.prompts
        ]
        return loss + o.diversity_weight * sum(terms) / len(terms)

    def private_parts(self) -> tuple[dict[str, Shared], dict[str, nn.Parameter]]:
        encode = lambda prompts: self.backbone.text_features(prompts, self.tokens)  # noqa: E731
        shared: dict[str, Shared] = {
            m: ((p,), encode) for m, p in self.prompts.items() if m == "text"
        }
        return shared, {m: p for m, p in self.prompts.items() if m == "visual"}

    def sample_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        text = outputs.get("text", self._fixed_text[None])  # (B or 1, m or 1, C, E)
        images = batch.images[None]
        if "visual" in outputs:
            prompts = outputs["visual"].transpose(0, 1)  # (m, B, l, W)
            images = vision.prompted_features(self.backbone, batch.images, prompts)
        logits = self.backbone.scale * (images[:, :, None] * text.transpose(0, 1)).sum(-1)
        labels = batch.labels.expand(len(logits), -1)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(0)
        o = self.options
        if "visual" in outputs and o.diversity_weight and o.groups > 1:
            alike = [likeness(row[:, None], o.diversity, o.compat) for row in images.unbind(1)]
            losses = losses + o.diversity_weight / len(outputs) * torch.stack(alike)
        return losses

    def data_free_loss(self) -> Tensor | None:
        o = self.options
        if "text" not in self.prompts or not o.diversity_weight or o.groups == 1:
            return None
        text = self.backbone.text_features(self.prompts["text"], self.tokens)
        return o.diversity_weight / len(self.prompts) * likeness(text, o.diversity, o.compat)

    def logits(self, batch: Batch) -> Tensor:
        text, images = self.features(batch)
        if self.options.inference in ("feature", "feature-unit"):
            text, images = text.mean(0, keepdim=True), images.mean(0, keepdim=True)
        if self.options.inference == "feature-unit":
            text, images = F.normalize(text, dim=-1), F.normalize(images, dim=-1)
        logits = self.group_logits(text, images)
        match self.options.inference:
            case "single":
                return logits[0]
            case "max":
                best = logits.amax(2).argmax(0)  # (B,)
                return logits[best, torch.arange(logits.shape[1], device=best.device)]
        return logits.mean(0)


_NAMES = {"text": "text", "visual": "vision"}


def likeness(features: Tensor, kind: str, compat: str = "") -> Tensor:
    """How alike groups are, to be minimised: mean over pairs of groups and over rows.

    Args:
        features: normalised, (m, R, E), m >= 2.
        kind: "cosine" similarity, or the negated "l1" (a mean over E) or "l2" distance.
        compat: "released" for what the released code minimises, whatever ``kind`` says: the l1
            distance itself, small where groups are alike.
    """
    groups, rows, _ = features.shape
    pairs = groups * (groups - 1)
    if kind == "l1" or compat:
        distance = torch.cdist(features.transpose(0, 1), features.transpose(0, 1), p=1)
        mean = distance.sum() / (pairs * rows * features.shape[-1])
        return mean if compat else -mean
    # Sum over i != j of <f_i, f_j> is |sum f|^2 - m for unit vectors: no gram matrix.
    if kind == "cosine":
        return (features.sum(0).square().sum(-1) - groups).mean() / pairs
    gram = torch.einsum("ire,jre->rij", features, features)
    same = torch.eye(groups, dtype=torch.bool, device=features.device)
    distance = (2 - 2 * gram).masked_fill(same, 1).clamp(min=1e-12).sqrt().masked_fill(same, 0)
    return -distance.sum() / (pairs * rows)


def slot_similarity(groups: Array, slots: Array) -> NDArray[np.float64]:
    """(m,) largest cosine of each flattened group with any slot."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (groups, slots))
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    best: NDArray[np.float64] = ((a @ b.T) / np.maximum(norms, 1e-12)).max(1)
    return best
