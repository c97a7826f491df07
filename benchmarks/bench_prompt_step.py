"""One local training step, the way public code takes it and the way this project does.

    python benchmarks/bench_prompt_step.py --json benchmarks/results/prompt_step.json
    python benchmarks/bench_prompt_step.py --model ViT-B-16 --random --device cuda --batch 32

The public way: all 77 text tokens, one text pass and one image pass for each prompt group, image
features computed again in every step, open_clip's own modules. Ours: text tokens up to the longest
class name, the shared prefix once, all groups in one pass, cached features where that is exact.
Both compute the same loss; the benchmark checks that the gradients agree. FLOPs are counted by
PyTorch (``torch.utils.flop_counter``), forward and backward. The second table is DP-SGD's: the
gradient of every image by itself, beside a loop of backward passes over the images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
from secure_fedprompt.protocol.settings import MethodSettings

METHODS = ("promptfl", "fedotp", "fedmgp")


def random_backbone(name: str, device: str) -> Backbone:
    """An architecture with random weights: speed does not depend on their values."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, device=device)
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    return Backbone(model, open_clip.get_tokenizer(name), transform, transform)


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


def timed(work: Callable[[], Any], device: str, repeat: int) -> dict[str, float]:
    times = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return machine.spread(times[2:])


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(name: str, backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways on one method; checks the gradients first."""
    names = [ALL_CLASSES[i % len(ALL_CLASSES)] + ("" if i < len(ALL_CLASSES) else f" {i}")
             for i in range(args.classes)]  # fmt: skip
    size = args.batch if name != "fedmgp" else args.group_batch
    settings = MethodSettings(method=name, n_ctx=16, batch_size=size)
    method = build(settings, backbone, names)
    resolution = getattr(backbone.model.visual, "image_size", 224)
    side = resolution[0] if isinstance(resolution, tuple) else resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size, 3, side, side, generator=generator).to(args.device)
    labels = (torch.arange(size) % args.classes).to(args.device)
    batch = Batch(encode(backbone, pixels, method.needs), labels)
    ours = lambda: step(lambda: method.loss(batch), method)  # noqa: E731
    theirs = lambda: step(lambda: public_loss(method, pixels, labels, names), method)  # noqa: E731
    gap = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), theirs(), strict=True)
    )
    assert gap < args.tolerance, f"gradients of {name} differ by {gap:.2g}"
    fast = timed(ours, args.device, args.repeat)
    slow = timed(theirs, args.device, max(3, args.repeat // 3))
    row = {
        "method": name, "batch": size, "classes": args.classes, "gradient_gap": gap,
        "public_s": slow, "ours_s": fast, "ratio": slow["median"] / fast["median"],
        "public_flops": flops(theirs), "ours_flops": flops(ours),
    }  # fmt: skip
    print(
        f"{name:9} B={size:3}  public {1e3 * slow['median']:8.1f} ms "
        f"({1e3 * slow['min']:.0f}-{1e3 * slow['max']:.0f})  ours {1e3 * fast['median']:7.1f} ms "
        f"({1e3 * fast['min']:.0f}-{1e3 * fast['max']:.0f})  {row['ratio']:5.1f}x  "
        f"{row['public_flops'] / 1e9:8.1f} -> {row['ours_flops'] / 1e9:.1f} GFLOP, "
        f"{row['ours_flops'] / fast['median'] / 1e9:.0f} GFLOP/s, gradients differ by {gap:.1e}",
        flush=True,
    )
    return row


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


def measure_private(name: str, backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """Per-image gradients of a step of DP-SGD; checks them against the loop."""
    names = [f"{ALL_CLASSES[i % len(ALL_CLASSES)]} {i}" for i in range(args.classes)]
    settings = MethodSettings(method=name, n_ctx=16, batch_size=args.batch)
    method = build(settings, backbone, names)
    resolution = getattr(backbone.model.visual, "image_size", 224)
    side = resolution[0] if isinstance(resolution, tuple) else resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(args.batch, 3, side, side, generator=generator).to(args.device)
    labels = (torch.arange(args.batch) % args.classes).to(args.device)
    batch = Batch(encode(backbone, pixels, method.needs), labels)
    loop = lambda: one_by_one(method, batch)  # noqa: E731
    wanted, slow = loop(), timed(loop, args.device, 1)
    plain = timed(lambda: step(lambda: method.loss(batch), method), args.device, args.repeat)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    training = PrivateTraining(
        method, optimiser, Draws(os.urandom), sigma=1.0, clip=1.0, expected=float(args.batch)
    )
    try:
        training.backward(batch)
        found = [p.grad_sample.clone() for p in method.parameters()]  # type: ignore[attr-defined]
        gap = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)
        )
        assert gap < args.tolerance, f"per-image gradients of {name} differ by {gap:.2g}"

        def ours() -> None:
            for p in method.parameters():
                p.grad_sample = None  # type: ignore[attr-defined]
            training.backward(batch)

        fast = timed(ours, args.device, args.repeat)
    finally:
        training.close()
    row = {
        "method": name, "batch": args.batch, "classes": args.classes, "gradient_gap": gap,
        "loop_s": slow, "ours_s": fast, "plain_step_s": plain,
        "ratio": slow["median"] / fast["median"],
    }  # fmt: skip
    print(
        f"{name:9} B={args.batch:3}  per image: loop {1e3 * slow['median']:8.1f} ms  ours "
        f"{1e3 * fast['median']:7.1f} ms ({1e3 * fast['min']:.0f}-{1e3 * fast['max']:.0f})  "
        f"{row['ratio']:5.1f}x; a step without dp {1e3 * plain['median']:.1f} ms",
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled", help="as a client's model")
    parser.add_argument("--random", action="store_true", help="random weights of an architecture")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="of promptfl and fedotp")
    parser.add_argument("--group-batch", type=int, default=8, help="of fedmgp")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--tolerance", type=float, default=2e-2, help="of gradients, relative")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = (
        random_backbone(args.model, args.device) if args.random
        else Backbone.load(args.model, device=args.device)
    )  # fmt: skip
    about = {**machine.describe(), "torch": torch.__version__, "threads": args.threads}
    if args.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    print(json.dumps(about))
    rows = [measure(name, backbone, args) for name in METHODS]
    private = [measure_private(name, backbone, args) for name in ("promptfl", "fedotp")]
    if args.json:
        model = Path(args.model).name
        content = {"machine": about, "model": model, "rows": rows, "per_image": private}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
