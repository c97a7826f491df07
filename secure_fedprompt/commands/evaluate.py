"""Use a trained prompt: ``evaluate`` on a labelled set, ``predict`` on images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from secure_fedprompt.clients.settings import ClientSettings, ModelSettings
from secure_fedprompt.host import command, plugins
from secure_fedprompt.protocol.errors import DataError, PromptFileError

if TYPE_CHECKING:
    import torch

    from secure_fedprompt.clients.methods.base import Method
    from secure_fedprompt.prompt_file import PromptFile

_AT_ONCE = 64  # images that are decoded and predicted together


def _parse(argv: list[str], prog: str, text: str, examples: str) -> argparse.ArgumentParser:
    parser = command.parser(f"secure-fedprompt {prog}", text, examples)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder or prompt file")
    if prog == "predict":
        parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files")
    parser.add_argument("--data", metavar="DIR", help="same as --dataset")
    parser.add_argument(
        "--other-classes", action="store_true", help="use the prompt on names it was not trained on"
    )
    command.add_flags(parser, ModelSettings)
    return parser


def evaluate(argv: list[str]) -> int:
    args = _parse(
        argv,
        "evaluate",
        "Accuracy, macro-F1 and accuracy by class of a trained prompt on the test images of a set.",
        "  secure-fedprompt evaluate runs/20260101-120000 --data photos/\n"
        "  secure-fedprompt evaluate state/alice/prompt-1a2b3c4d.safetensors --data photos.zip \\\n"
        "      --model ViT-B-16 --pretrained openai",
    ).parse_args(argv)
    return command.guard(lambda: _with(args, _evaluate), args)


def predict(argv: list[str]) -> int:
    args = _parse(
        argv,
        "predict",
        "Name the class of images. The class list comes from a client's prompt file, from "
        "--class-list, or from the folders of --data.",
        "  secure-fedprompt predict state/alice/prompt-1a2b3c4d.safetensors cat.jpg dog.jpg",
    ).parse_args(argv)
    return command.guard(lambda: _with(args, _predict), args)


Body = Callable[[argparse.Namespace, ModelSettings, "PromptFile"], int]


def _with(args: argparse.Namespace, body: Body) -> int:
    from secure_fedprompt.prompt_file import read_prompt

    args.dataset = args.data or args.dataset
    settings = command.load(ModelSettings, args, beside=ClientSettings)
    prompt = read_prompt(args.run)
    plugins.find(prompt.settings.method)  # of a package that this user has installed
    return body(args, settings, prompt)


@dataclass(frozen=True)
class Scores:
    """Attributes:
    figures: accuracy, macro-F1, loss, by class.
    held: images that were not scored; note: how the data set was split.
    """

    figures: dict[str, Any]
    held: int
    note: str


def score(settings: ModelSettings, prompt: PromptFile, other_classes: bool = False) -> Scores:
    """Figures of a prompt on the test images of a set, or on all if there are none.

    Raises:
        DataError, ModelError, PromptFileError
    """
    from secure_fedprompt.clients.backbone import Backbone
    from secure_fedprompt.clients.data.loading import load_part, load_sets
    from secure_fedprompt.clients.features import Features
    from secure_fedprompt.clients.features import predict as guess
    from secure_fedprompt.clients.methods.base import build
    from secure_fedprompt.clients.metrics import macro_f1
    from secure_fedprompt.protocol.settings import MethodSettings

    if settings.parts > 1:
        train, test = load_part(settings)
    else:
        names_of = prompt.class_names if Path(settings.dataset).exists() else ()
        train, test = load_sets(settings, None if other_classes else names_of or None)
    images = test if len(test) else train
    backbone = Backbone.load(
        settings.model, settings.pretrained, settings.device, settings.precision
    )
    names = images.class_names
    method = prompt.method(backbone, names, other_classes=other_classes)
    features = Features(backbone, images, method.needs, lambda what, done, total: None, "")
    guesses, losses = guess(method, features)
    hits = guesses == images.labels
    per_class = {names[c]: float(hits[images.labels == c].mean()) for c in np.unique(images.labels)}
    words = build(MethodSettings(method="zeroshot"), backbone, names)
    if words.needs != method.needs:
        features = Features(backbone, images, words.needs, lambda what, done, total: None, "")
    figures = {
        "images": len(images),
        "accuracy": float(hits.mean()),
        "zero_shot": float((guess(words, features)[0] == images.labels).mean()),
        "macro_f1": macro_f1(images.labels, guesses),
        "loss": float(losses.mean()),
        "per_class": per_class,
    }
    return Scores(figures, len(train) if images is test else 0, train.note)


def _evaluate(args: argparse.Namespace, settings: ModelSettings, prompt: PromptFile) -> int:
    found = score(settings, prompt, args.other_classes)
    result, images = found.figures, found.figures["images"]
    table = Table(title=f"{prompt.path.name} on {images} images")
    table.add_column("class")
    table.add_column("accuracy", justify="right")
    for name, value in result["per_class"].items():
        table.add_row(name, f"{value:.1%}")
    console = Console(highlight=False)
    console.print(table)
    if found.held and not found.note:
        console.print(
            f"scored are the {images} of {found.held + images} images that test_share = "
            f"{settings.test_share:g} holds out; --test-share 1 scores all",
            soft_wrap=True,
        )
    console.print(
        f"accuracy {result['accuracy']:.2%} (zero-shot {result['zero_shot']:.2%}), macro-F1 "
        f"{result['macro_f1']:.2%}"
    )
    command.write_json(args.json, "evaluate", result)
    return 0


def _likeliest(
    method: Method, images: torch.Tensor, names: Sequence[str]
) -> list[dict[str, float]]:
    """The three likeliest classes of each image, with their probabilities."""
    import torch

    from secure_fedprompt.clients.methods.base import Batch

    with torch.no_grad():
        batch = Batch(images, torch.zeros(len(images), dtype=torch.long))
        best = method.logits(batch).float().softmax(1).topk(min(3, len(names)))
    return [
        {names[int(i)]: float(p) for p, i in zip(values, index, strict=True)}
        for values, index in zip(*best, strict=True)
    ]


def _predict(args: argparse.Namespace, settings: ModelSettings, prompt: PromptFile) -> int:
    import torch

    from secure_fedprompt.clients.backbone import Backbone
    from secure_fedprompt.clients.data.images import read_image
    from secure_fedprompt.clients.data.loading import load_sets
    from secure_fedprompt.clients.data.sets import read_class_list
    from secure_fedprompt.clients.features import at_once, encode

    names = prompt.class_names
    if settings.class_list:
        names = read_class_list(Path(settings.class_list))
    elif args.data or not names:
        if not args.data:
            raise PromptFileError(
                f"prompt {prompt.path} is a server's and names no classes: give --class-list FILE, "
                "--data DIR, or a client's prompt file"
            )
        names = load_sets(msgspec.structs.replace(settings, dataset=args.data))[0].class_names
    backbone = Backbone.load(
        settings.model, settings.pretrained, settings.device, settings.precision
    )
    method = prompt.method(backbone, names, other_classes=args.other_classes)
    result: list[dict[str, object]] = []
    failure: DataError | None = None

    def pixels_of(path: Path) -> torch.Tensor | DataError:
        try:
            return backbone.test_transform(read_image(path))
        except DataError as error:  # a bad file loses nothing of the others
            return error

    for start in range(0, len(args.images), _AT_ONCE):  # never all in memory
        paths = args.images[start : start + _AT_ONCE]
        found = at_once(pixels_of, paths)
        pixels = [x for x in found if isinstance(x, torch.Tensor)]
        rows = iter(_likeliest(method, encode(backbone, torch.stack(pixels), method.needs), names)
                    if pixels else [])  # fmt: skip
        for path, image in zip(paths, found, strict=True):
            if isinstance(image, DataError):
                failure = failure or image
                print(f"{path}  {image}")
                result.append({"image": str(path), "error": str(image)})
                continue
            guesses = next(rows)
            print(f"{path}  " + ", ".join(f"{name} {p:.1%}" for name, p in guesses.items()))
            result.append({"image": str(path), "classes": guesses})
    command.write_json(args.json, "predict", {"predictions": result})
    if failure is not None:
        raise failure
    return 0
