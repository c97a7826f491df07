"""The training step of every method: one graph, on any device."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from models import in_double
from rounds import make_plan
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from secure_fedprompt.client import load_trainer
from secure_fedprompt.clients import learning
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.sets import generated_sets
from secure_fedprompt.clients.features import encode
from secure_fedprompt.clients.methods.base import METHODS, Batch, Method, build
from secure_fedprompt.clients.settings import ClientSettings, PrivacySettings
from secure_fedprompt.clients.steps import CompiledSteps, Steps
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.settings import FedMGPSettings, FedOTPSettings, MethodSettings

NAMES = ("red circle", "blue circle", "plain green square")
TRAINED = tuple(name for name in METHODS if name != "zeroshot")


def prepared(name: str, backbone: Backbone) -> tuple[Method, Batch]:
    settings = MethodSettings(
        method=name, n_ctx=4, fedmgp=FedMGPSettings(groups=2, slots=1),
        fedotp=FedOTPSettings(iterations=5),
    )  # fmt: skip
    method = build(settings, backbone, NAMES)
    generator = torch.Generator().manual_seed(0)
    size = backbone.model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    pixels = torch.randn(6, 3, side, side, generator=generator).to(backbone.dtype)
    batch = Batch(encode(backbone, pixels, method.needs), torch.arange(6) % 3)
    method.observe(batch.images, batch.labels)
    return method, batch


def steps(method: Method) -> Steps:
    return Steps(method, lr=0.01, momentum=0.9, weight_decay=5e-4)


def in_precision(bundled: Backbone, precision: str) -> Backbone:
    if precision == "bf16":
        return Backbone.load("bundled", device="cpu", precision="bf16")
    return in_double(bundled)


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_is_pytorchs_own_sgd(name: str, bundled: Backbone) -> None:
    finals = []
    for ours in (True, False):
        method, batch = prepared(name, in_double(bundled))
        for p in method.parameters():
            p.data = p.data.double()
        taking = steps(method)
        sgd = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for number in range(3):
            if ours:
                taking.rate.fill_(0.01 / (1 + number))
                taking.take(batch)
                continue
            sgd.param_groups[0]["lr"] = 0.01 / (1 + number)
            sgd.zero_grad()
            torch.autograd.backward(method.loss(batch))
            sgd.step()
        finals.append([p.detach().clone() for p in method.parameters()])
    for one, other in zip(*finals, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-14)


QUICK = {("promptfl", "double"), ("fedotp", "double")}
GRAPHS = [
    pytest.param(name, precision, marks=() if (name, precision) in QUICK else pytest.mark.slow)
    for name in TRAINED for precision in ("double", "bf16")
]  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_the_whole_step_is_one_graph_and_the_same_as_without(
    name: str, precision: str, bundled: Backbone
) -> None:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch traces no gradients")
    torch._dynamo.reset()
    backbone = in_precision(bundled, precision)
    finals = []
    for compiled in (False, True):
        method, batch = prepared(name, backbone)
        taking = steps(method)
        take: Callable[[Batch], Tensor] = taking.take
        if compiled:
            take = torch.compile(take, fullgraph=True, backend="aot_eager", dynamic=False)
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            losses = [float(take(batch)) for _ in range(2)]
        finals.append((losses, [p.detach().double().clone() for p in method.parameters()]))
    (losses, plain), (compiled_losses, graph) = finals
    tolerance = 1e-6 if precision == "double" else 2e-2  # prompts are float32 in either
    assert np.allclose(losses, compiled_losses, rtol=tolerance)
    for one, other in zip(plain, graph, strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


SLOWER = (pytest.param(name, marks=pytest.mark.slow) for name in ("fedmgp", "fedotp", "fedprox"))


@pytest.mark.parametrize("name", ["promptfl", *SLOWER])
def test_a_client_compiles_once_and_trains_as_without(
    name: str, bundled: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds, with a smaller last batch: two graphs, whatever a round begins with."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch traces no gradients")
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    compiled = functools.partial(CompiledSteps, backend=counting)
    monkeypatch.setattr(learning, "CompiledSteps", compiled)
    train, test = generated_sets(3, ["sketch"], 6, 1, 0)
    settings = MethodSettings(
        method=name, n_ctx=4, lr=0.02, epochs=2, batch_size=4,
        fedmgp=FedMGPSettings(groups=2, slots=1), fedotp=FedOTPSettings(iterations=5),
    )  # fmt: skip
    finals = []
    for compiling in (False, True):
        client = LocalTrainer(bundled, train, test, seed=1)
        client.compile = compiling
        learner = client.prepare(settings)
        base, losses = learner.initial(), list[float | None]()
        for number in (1, 2, 3):
            plan = make_plan(
                3,
                tensors=learner.tensors(),
                max_weight=200,
                max_seen=200,
                round=number,
                learning_round=number,
                rounds=3,
            )
            update = learner.run(Work(plan, base))
            assert isinstance(update, Update)
            base = base + np.concatenate(
                [np.ravel(update.values[t.name]) for t in learner.tensors()]
            ).astype(np.float32)
            losses += [learner.figures.first_loss, learner.figures.last_loss]
        finals.append((base, losses))
    assert counting.frame_count == 2
    (plain, first), (graph, second) = finals
    assert np.allclose(plain, graph, atol=1e-5)
    assert np.allclose(np.array(first, float), np.array(second, float), rtol=1e-4)
    assert np.abs(plain - learner.initial()).max() > 1e-2


def test_what_cannot_be_compiled_says_to_leave_it_out(bundled: Backbone) -> None:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch traces no gradients")

    def broken(graph: Any, example: Any) -> Any:
        raise KeyError("buf613")  # as inductor's own

    method, batch = prepared("promptfl", bundled)
    taking = CompiledSteps(method, lr=0.1, momentum=0.9, weight_decay=0.0, backend=broken)
    with pytest.raises(ConfigError, match=r"cannot compile a step of promptfl on cpu .* leave it"):
        taking.take(batch)


def test_steps_of_dp_are_not_compiled() -> None:
    dp = PrivacySettings(kind="sample", noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="steps of DP-SGD cannot be compiled"):
        load_trainer(ClientSettings(compile=True, dp=dp), None, None)  # type: ignore[arg-type]


def moved(method: Method, batch: Batch, place: Callable[[Tensor], Tensor]) -> tuple[Method, Batch]:
    """Deep copies with every tensor in another place."""

    def tensor(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = place(self.detach()).requires_grad_(self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def parameter(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(place(self.detach()), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", tensor)
        patch.setattr(nn.Parameter, "__deepcopy__", parameter)
        return copy.deepcopy((method, batch))


@pytest.mark.parametrize("name", TRAINED)
def test_the_forward_pass_runs_on_fake_cuda_tensors(name: str, bundled: Backbone) -> None:
    """Without a card: gradients on fake CUDA tensors need a real one, shapes and devices do not."""
    if torch.__version__ < (2, 9):
        pytest.skip("fake CUDA tensors need a driver in this PyTorch")
    mode = FakeTensorMode()

    def place(x: Tensor) -> Tensor:
        fake = mode.from_tensor(x)
        with mode:
            return fake.to("cuda:0")

    method, batch = moved(*prepared(name, bundled), place)
    with mode, torch.no_grad():
        assert method.loss(batch).device.type == "cuda"
        assert method.logits(batch).shape == (6, 3)
