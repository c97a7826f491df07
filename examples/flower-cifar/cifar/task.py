"""A small network with batch normalisation, and its images. Nothing here knows of protection."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

SHAPE = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 8 * 8, classes),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def images(data: str, train: bool) -> Dataset:
    if data == "fake":
        return datasets.FakeData(300 if train else 60, (3, 32, 32), 10, transforms.ToTensor())
    if not data:
        return datasets.CIFAR10("data", train=train, download=True, transform=SHAPE)
    every = datasets.ImageFolder(data, SHAPE)
    return Subset(every, [i for i in range(len(every)) if (i % 5 == 0) != train])


def share(data: str, part: int, parts: int) -> Dataset:
    every = images(data, train=True)
    return Subset(every, range(part, len(every), parts))


def fit(model: Net, data: Dataset, lr: float, batch_size: int, epochs: int) -> float:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    total = 0.0
    for _ in range(epochs):
        for batch, labels in DataLoader(data, batch_size, shuffle=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total


@torch.no_grad()
def accuracy(model: Net, data: Dataset) -> float:
    model.eval()
    right = sum(
        int((model(batch).argmax(1) == labels).sum()) for batch, labels in DataLoader(data, 256)
    )
    return right / len(data)
