"""Each method wins where what it adds is what is needed, by construction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from constructed import CLASSES, Plain, federate, method_of, right

from secure_fedprompt.clients.methods.base import Batch
from secure_fedprompt.protocol.settings import FedMGPSettings, FedOTPSettings

EVERY = torch.arange(CLASSES).repeat(20)


def confusing(world: Plain) -> torch.Tensor:
    """A shift that makes images of half the classes look like those of the other half."""
    half = CLASSES // 2
    return 0.8 * (world.names[:half].sum(0) - world.names[half:].sum(0))


def test_promptfl_undoes_a_shift_that_no_client_sees_whole() -> None:
    """Each client has two classes: alone it learns what tells these apart, and nothing of others."""
    world = Plain()
    shift = confusing(world)
    test = Batch(world.images(EVERY, shift, 99), EVERY)
    parts = [torch.tensor([a, a + CLASSES // 2]).repeat(8) for a in range(CLASSES // 2)]
    data = [Batch(world.images(labels, shift, k), labels) for k, labels in enumerate(parts)]
    found = {}
    for name in ("zeroshot", "coop", "promptfl"):
        methods = [method_of(name, world) for _ in parts]
        if name != "zeroshot":
            federate(methods, data, 20, 0.05)
        found[name] = sum(right(m, test) for m in methods) / len(methods)
    assert found["zeroshot"] < 0.6
    assert found["promptfl"] > 0.95
    assert found["promptfl"] > found["coop"] + 0.1


@pytest.mark.parametrize("name", ["fedmgp", pytest.param("fedotp", marks=pytest.mark.slow)])
def test_what_is_kept_apart_serves_clients_whose_shifts_contradict(name: str) -> None:
    """To half of the clients a class looks like the next one, to half like the one before: a prompt
    for all is a compromise, and leaves two answers for each image."""
    world = Plain(turning=True)
    signs = (1, -1, 1, -1)
    shifts = [world.turned(sign) - world.names for sign in signs]
    images = lambda seed: [  # noqa: E731
        Batch(world.images(EVERY, shift, seed + k), EVERY) for k, shift in enumerate(shifts)
    ]
    data, tests = images(0), images(50)
    options = {
        "promptfl": {},
        "fedmgp": {"fedmgp": FedMGPSettings(groups=4, slots=1, modality="text", inference="max")},
        "fedotp": {"fedotp": FedOTPSettings(gamma=0.5)},
    }
    found = {}
    for method in ("promptfl", name):
        methods = [method_of(method, world, **options[method]) for _ in signs]
        reads = data, tests
        if method == "fedotp":  # patches: the image itself, four times
            reads = tuple(
                [Batch(b.images[:, None].expand(-1, 4, -1), b.labels) for b in side]
                for side in reads
            )
        federate(methods, reads[0], 15, 0.05)
        found[method] = sum(map(right, methods, reads[1])) / len(methods)
    assert found["promptfl"] < 0.75
    assert found[name] > 0.9


def test_unbalanced_transport_leaves_out_the_patches_that_contradict() -> None:
    """Half of an image's patches say its class, the other half the opposite: their mean says
    nothing, nor does a plan that must match them all; one that matches half of them says all."""
    world = Plain()
    said = world.images(EVERY, torch.zeros(()), 1, 0.2)[:, None].expand(-1, 8, -1)
    patches = torch.cat([said, -said], 1)
    patches = F.normalize(patches + 0.15 * torch.randn_like(patches), dim=-1)
    found = {}
    for transport in ("unbalanced", "classical", "average"):
        options = FedOTPSettings(transport=transport, gamma=0.5, eps=0.05)
        method = method_of("fedotp", world, fedotp=options)
        found[transport] = right(method, Batch(patches, EVERY))
    assert found["unbalanced"] > 0.95
    assert max(found["classical"], found["average"]) < 0.3
