"""One local training step, the way public code takes it and the way this project does.

The public way: all 77 text tokens, one text pass and one image pass for each prompt group, image
features computed again in every step, open_clip's own modules. Ours: text tokens up to the longest
class name, the shared prefix once, all groups in one pass, cached features where that is exact.
Both compute the same loss, and the gradients are compared. FLOPs are counted by PyTorch
(``torch.utils.flop_counter``), forward and backward, of ours. Per image: the gradients of a step of
DP-SGD, beside a loop of backward passes over the images, and beside Opacus as its documentation
says (a module with a parameter of its own: functorch). Compiled: the same step as one graph of
``torch.compile``, beside the step as it is, and what making the graph takes. One thread; where
there is a GPU, ViT-B/16 with random weights on it as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from secure_fedprompt.bench.chapter import Case, Chapter, Column, Curve, Samples
from secure_fedprompt.clients import vision
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.generated import ALL_CLASSES
from secure_fedprompt.clients.dp_sgd import Draws, PrivateTraining
from secure_fedprompt.clients.features import encode
from secure_fedprompt.clients.methods.base import Batch, Method, build
from secure_fedprompt.clients.methods.fedmgp import FedMGP, likeness
from secure_fedprompt.clients.methods.fedotp import FedOTP
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.clients.methods.transport import transported_similarity
from secure_fedprompt.clients.steps import CompiledSteps, Steps
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings

STEP, EACH, COMPILED = "step", "per image", "compiled"
TOLERANCE = 2e-2  # of gradients, relative: CUDA's half precision


@cache
def backbone_of(model: str, device: str) -> Backbone:
    """The bundled one, or an architecture with random weights: speed does not depend on them."""
    if model == "bundled":
        return Backbone.load(model, device=device)
    import open_clip

    torch.manual_seed(0)
    made = open_clip.create_model(model, pretrained=None, device=device)
    transform = open_clip.image_transform(made.visual.image_size, is_train=False)
    return Backbone(made, open_clip.get_tokenizer(model), transform, transform)


def all_tokens(backbone: Backbone, ctx: Tensor, names: list[str], behind: str) -> Tensor:
    """Text features (C, E) of one prompt over the whole context length, by open_clip's modules."""
    text, rows, ends = backbone.text, [], []
    sos, eot = backbone.tokenizer([""])[0][:2].tolist()
    for name in names:
        words = backbone.words(f"{behind} {name}.".strip())
        tail = backbone.embed([*words, eot])
        row = torch.cat([backbone.embed([sos]), ctx, tail])
        ends.append(len(row) - 1)
        rows.append(F.pad(row, (0, 0, 0, backbone.length - len(row))))
    x = torch.stack(rows) + text.positional_embedding
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))
    pooled = x[torch.arange(len(names)), ends]
    projection = text.text_projection
    pooled = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
    return F.normalize(pooled, dim=-1)


def prompted(backbone: Backbone, pixels: Tensor, prompt: Tensor) -> Tensor:
    """Image features (B, E) with one group of visual tokens, by open_clip's modules."""
    visual: Any = backbone.model.visual
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x = torch.cat([x + visual.positional_embedding, prompt.expand(len(x), -1, -1)], 1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(x))[:, 0])
    return F.normalize(x @ visual.proj, dim=-1)


def public_loss(method: Method, pixels: Tensor, labels: Tensor, names: list[str]) -> Tensor:
    """The same loss, the public way."""
    if isinstance(method, FedMGP):
        backbone, length = method.backbone, method.options.length
        behind = " ".join(["a", "photo", "of", "a"][length:])
        texts, images = [], []
        for g in range(method.options.groups):
            texts.append(all_tokens(backbone, method.prompts["text"][g], names, behind))
            images.append(prompted(backbone, pixels, method.prompts["visual"][g]))
        losses = [
            F.cross_entropy(backbone.scale * image @ text.T, labels)
            for text, image in zip(texts, images, strict=True)
        ]
        spread = likeness(torch.stack(texts), "cosine") + likeness(torch.stack(images), "cosine")
        return torch.stack(losses).mean() + spread / 2
    assert isinstance(method, PromptFL | FedOTP)
    backbone = method.backbone
    text = all_tokens(backbone, method.ctx[0], names, "")
    if isinstance(method, FedOTP):
        both = torch.stack([text, all_tokens(backbone, method.local[0], names, "")])
        patches = vision.patch_features(backbone, pixels)
        o = method.options
        similarity = torch.einsum("bme,nce->bcmn", patches, both)
        logits = transported_similarity(
            similarity, mode=o.transport, eps=o.eps, gamma=o.gamma, iterations=o.iterations
        )
        return F.cross_entropy(backbone.scale * logits, labels)
    return F.cross_entropy(backbone.scale * backbone.image_features(pixels) @ text.T, labels)


def step(loss: Callable[[], Tensor], method: Method) -> list[Tensor]:
    for p in method.parameters():
        p.grad = None
    torch.autograd.backward(loss())
    return [p.grad.clone() for p in method.parameters() if p.grad is not None]


def one_by_one(method: Method, batch: Batch) -> list[Tensor]:
    """Gradients of every image, a backward pass for each."""
    rows = []
    for i in range(len(batch.labels)):
        for p in method.parameters():
            p.grad = None
        torch.autograd.backward(
            method.loss(Batch(batch.images[i : i + 1], batch.labels[i : i + 1]))
        )
        rows.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def timed(work: Callable[[], Any], device: str, repeat: int) -> list[float]:
    """Milliseconds, after two that are not counted."""
    times = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[2:]


def gflop(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops()) / 1e9


def prepared(case: Case) -> tuple[Method, Tensor, Batch, list[str]]:
    """The method of a case, random pixels, the same encoded and labelled, and class names."""
    backbone, count = backbone_of(case["model"], case["device"]), case["classes"]
    names = [ALL_CLASSES[i % len(ALL_CLASSES)] + ("" if i < len(ALL_CLASSES) else f" {i}")
             for i in range(count)]  # fmt: skip
    m = case["groups"] or FedMGPSettings().groups
    settings = MethodSettings(
        method=case["method"], n_ctx=case["tokens"], batch_size=case["batch"],
        fedmgp=FedMGPSettings(groups=m, slots=min(2, m)),
    )  # fmt: skip
    method = build(settings, backbone, names)
    resolution = getattr(backbone.model.visual, "image_size", 224)
    side = resolution[0] if isinstance(resolution, tuple) else resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(case["batch"], 3, side, side, generator=generator).to(case["device"])
    labels = (torch.arange(case["batch"]) % count).to(case["device"])
    return method, pixels, Batch(encode(backbone, pixels, method.needs), labels), names


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Gradients that should be the same are.

    Raises:
        AssertionError: by how much they differ.
    """
    pairs = zip(ours, theirs, strict=True)
    gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    assert gap < TOLERANCE, f"gradients differ by {gap:.2g}"


def measure(case: Case, repeat: int) -> Samples:
    """Both ways, after their gradients were compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {STEP: _step, EACH: _each, COMPILED: _compiled}[case["work"]](case, repeat)
    finally:
        torch.set_num_threads(threads)


def _step(case: Case, repeat: int) -> Samples:
    method, pixels, batch, names = prepared(case)

    def ours() -> list[Tensor]:
        return step(lambda: method.loss(batch), method)

    def theirs() -> list[Tensor]:
        return step(lambda: public_loss(method, pixels, batch.labels, names), method)

    agree(ours(), theirs())
    fast = timed(ours, case["device"], repeat)
    slow = timed(theirs, case["device"], max(3, repeat // 3))
    return {"ms": fast, "other_ms": slow, "ratio": ratios(slow, fast), "gflop": [gflop(ours)]}


def _each(case: Case, repeat: int) -> Samples:
    method, _, batch, _ = prepared(case)
    wanted = one_by_one(method, batch)
    slow = timed(lambda: one_by_one(method, batch), case["device"], 1)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    training = PrivateTraining(
        method, optimiser, Draws(os.urandom), sigma=1.0, clip=1.0, expected=float(case["batch"])
    )

    def ours() -> list[Tensor]:
        for p in method.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]
        training.backward(batch)
        return [p.grad_sample for p in method.parameters()]  # type: ignore[attr-defined]

    try:
        agree(ours(), wanted)
        fast = timed(ours, case["device"], repeat)
    finally:
        training.close()
    return {"ms": fast, "other_ms": slow, "ratio": ratios(slow, fast)}


def _compiled(case: Case, repeat: int) -> Samples:
    method, _, batch, _ = prepared(case)
    plain = Steps(method, lr=1e-6, momentum=0.9, weight_decay=0.0)
    graph = CompiledSteps(method, lr=1e-6, momentum=0.9, weight_decay=0.0)
    begin = time.perf_counter()
    graph.take(batch)
    made = time.perf_counter() - begin
    fast = timed(lambda: graph.take(batch), case["device"], repeat)
    slow = timed(lambda: plain.take(batch), case["device"], repeat)
    return {"ms": fast, "other_ms": slow, "ratio": ratios(slow, fast), "compile_s": [made]}


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Of medians, and the least and the most that the samples allow."""
    middle = sorted(slow)[len(slow) // 2] / sorted(fast)[len(fast) // 2]
    return [min(slow) / max(fast), middle, max(slow) / min(fast)]


def cases(quick: bool) -> list[Case]:
    def row(work: str, method: str, batch: int, classes: int, tokens: int = 16, groups: int = 0,
            model: str = "bundled", device: str = "cpu") -> Case:  # fmt: skip
        return {"work": work, "method": method, "batch": batch, "classes": classes,
                "tokens": tokens, "groups": groups, "model": model, "device": device}  # fmt: skip

    made = [row(STEP, "promptfl", 32, 32), row(STEP, "fedotp", 32, 32),
            row(STEP, "fedmgp", 8, 32, groups=5), row(EACH, "promptfl", 32, 32)]  # fmt: skip
    if not quick:
        made += [row(STEP, "promptfl", 32, c) for c in (10, 100, 320)]
        made += [row(STEP, "promptfl", 32, 100, tokens=t) for t in (1, 2, 4, 8, 32)]
        made += [row(STEP, "fedotp", 32, 100), row(STEP, "fedmgp", 8, 100, groups=5)]
        made += [row(STEP, "fedmgp", 8, 32, groups=g) for g in (2, 10)]
        made += [row(EACH, method, 32, 100) for method in ("promptfl", "fedotp")]
        made += [row(COMPILED, method, 8, 32) for method in ("promptfl", "fedotp")]
        if torch.cuda.is_available():
            made += [row(STEP, method, b, 100, groups=g, model="ViT-B-16", device="cuda")
                     for method, b, g in (("promptfl", 32, 0), ("fedotp", 32, 0),
                                          ("fedmgp", 8, 5))]  # fmt: skip
    return sorted(made, key=lambda case: [str(v).zfill(4) for v in case.values()])


def limit(case: Case, known: Mapping[str, float]) -> float:
    """The step's own multiplications at the rate of a large matrix product, in ms."""
    method, _, batch, _ = prepared(case)
    return 1e3 * gflop(lambda: step(lambda: method.loss(batch), method)) / known["matmul_gflop_s"]


def opacus_runs(case: Case) -> bool:
    """It has no transport and no cached patches: only the method that is logits of features."""
    return bool(case["work"] == EACH and case["method"] == "promptfl" and case["device"] == "cpu")


ONE = {"work": STEP, "model": "bundled", "device": "cpu"}
PROMPTFL, FEDMGP = {**ONE, "method": "promptfl", "batch": 32}, {**ONE, "method": "fedmgp"}
CHAPTER = Chapter(
    name="training",
    title="A local training step",
    about=__doc__,
    keys={"work": "work", "method": "method", "batch": "B", "classes": "C", "tokens": "tokens",
          "groups": "m", "model": "model", "device": "device"},
    columns=(
        Column("ms", "ms"), Column("other_ms", "the other way, ms"),
        Column("ratio", "ratio", 3, less=False), Column("gflop", "GFLOP of ours", 3),
        Column("compile_s", "compiling, s"),
    ),
    cases=cases,
    measure=measure,
    repeat=11,
    curves=(
        Curve("step by C", "classes", "ms", {**PROMPTFL, "tokens": 16}, limit),
        Curve("step by tokens", "tokens", "ms", {**PROMPTFL, "classes": 100}, limit),
        Curve("FedMGP's step by m", "groups", "ms", {**FEDMGP, "classes": 32}, limit),
    ),
    peers={"opacus": opacus_runs},
)  # fmt: skip
