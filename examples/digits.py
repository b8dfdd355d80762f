"""What the examples share, none of it ftfast's: scikit-learn's 8x8 digits, a small network, and a trained teacher."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loaders() -> tuple[DataLoader, DataLoader]:
    """1400 images ``[1, 8, 8]`` from 0 to 1 with their labels, in random order, and 397 to test with."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target)
    train, test = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=64)


def network(width: int) -> nn.Module:
    """A classifier whose layer ``"features"`` gives a map ``[N, width, 4, 4]``."""
    net = nn.Sequential()
    net.features = nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
    )
    net.classifier = nn.Sequential(nn.Flatten(), nn.Linear(width * 16, 10))
    return net


def train_classifier(net: nn.Module, epochs: int = 5, device: torch.device | str = "cpu") -> nn.Module:
    """The network, trained with labels alone, frozen and in eval mode."""
    net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for images, labels in (batch for _ in range(epochs) for batch in loaders()[0]):
        optimizer.zero_grad()
        F.cross_entropy(net(images.to(device)), labels.to(device)).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)
