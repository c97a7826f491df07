"""Prompt files: safetensors with enough metadata to refuse what they do not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.loading import classes_digest
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.methods.base import Method, build
from secure_fedprompt.host.files import write_tensors, written
from secure_fedprompt.protocol.errors import PromptFileError
from secure_fedprompt.protocol.settings import MethodSettings

FORMAT = "secure-fedprompt/1"


@dataclass(frozen=True)
class PromptFile:
    """A trained prompt. ``class_names`` is empty in a server's file: the server knows only the
    digest of the class list."""

    path: Path
    settings: MethodSettings
    model_fingerprint: bytes
    classes_digest: bytes
    class_names: tuple[str, ...]
    tensors: dict[str, NDArray[np.float32]]

    def method(self, backbone: Backbone, names: tuple[str, ...], *, other_classes: bool) -> Method:
        """The method with this prompt, ready to predict.

        Args:
            backbone: must be the model that the prompt was trained on.
            names: classes to tell apart.
            other_classes: allow names that the prompt was not trained on.

        Raises:
            PromptFileError: another model, other classes, other shapes.
        """
        if backbone.fingerprint != self.model_fingerprint:
            raise PromptFileError(
                f"prompt {self.path} was trained on a model with fingerprint "
                f"{self.model_fingerprint.hex()[:16]}, this one has "
                f"{backbone.fingerprint.hex()[:16]}: give the same --model and --pretrained"
            )
        if not other_classes and classes_digest(names) != self.classes_digest:
            raise PromptFileError(
                f"prompt {self.path} was trained for another class list (digest "
                f"{self.classes_digest.hex()[:16]}, these {len(names)} names have "
                f"{classes_digest(names).hex()[:16]}): give the list with --class-list, or "
                "--other-classes to use the prompt on new names"
            )
        method = build(self.settings, backbone, names)
        for spec in method.uploaded():
            found = self.tensors.get(spec.name)
            if found is None or found.shape != tuple(spec.shape):
                shape = None if found is None else found.shape
                raise PromptFileError(
                    f"prompt {self.path}: tensor {spec.name!r} has shape {shape}, not {spec.shape}"
                )
        own = {
            name.removeprefix("private."): values
            for name, values in self.tensors.items()
            if name.startswith("private.")
        }
        if own:
            method.load(self.tensors)
            method.restore(own)
        else:
            method.adopt(self.tensors)
        return method


def write_prompt(path: Path, learner: LocalLearner) -> None:
    """The learner's current prompt, with class names."""
    metadata = {
        "format": FORMAT,
        "method": learner.settings.method,
        "settings": learner.settings.to_bytes().decode(),
        "model_fingerprint": learner.client.model_fingerprint.hex(),
        "classes_digest": learner.client.classes_digest.hex(),
        "class_names": json.dumps(learner.client.class_names),
        "layout": json.dumps([asdict(t) for t in learner.method.uploaded()]),
    }
    private = {f"private.{name}": values for name, values in learner.method.private().items()}
    with written(f"prompt {path}"):
        write_tensors(path, {**learner.method.state(), **private}, metadata)


def read_prompt(where: Path) -> PromptFile:
    """A prompt file, or the newest one of a run folder.

    Raises:
        PromptFileError: nothing there, or not such a file.
    """
    path = where
    if where.is_dir():
        if any(where.glob("prompts/sealed-*")):
            raise PromptFileError(
                f"the prompts in {where} are sealed: this server never held one; "
                "give a client's prompt file"
            )
        found = sorted(
            [*where.glob("prompts/global-*.safetensors"), *where.glob("prompt-*.safetensors")]
        )
        if not found:
            raise PromptFileError(f"run folder {where} holds no prompt yet")
        path = found[-1]
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise PromptFileError(f"{path} is not a prompt of this program (format {FORMAT})")
        all_settings = json.loads(metadata["settings"])
        own = {k: v for k, v in all_settings.items() if k in MethodSettings.__struct_fields__}
        return PromptFile(
            path,
            msgspec.convert(own, MethodSettings),
            bytes.fromhex(metadata["model_fingerprint"]),
            bytes.fromhex(metadata["classes_digest"]),
            tuple(json.loads(metadata.get("class_names", "[]"))),
            tensors,
        )
    except (OSError, SafetensorError, ValueError, KeyError, msgspec.ValidationError) as error:
        raise PromptFileError(f"prompt {path} cannot be read: {error}") from None
