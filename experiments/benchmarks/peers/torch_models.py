"""LeNet-5 and ResNet-20 in PyTorch, as those in `experiments.models` but channels first."""

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

Layers = dict[str, Callable[..., Any]]
"""What makes layers: "conv", "linear", "relu", and "identity" where tensors get a grid."""
PLAIN: Layers = {"conv": nn.Conv2d, "linear": nn.Linear, "relu": nn.ReLU, "identity": nn.Identity}


class LeNet5(nn.Module):
    """Classify digits of 32x32."""

    def __init__(self, layers: Layers = PLAIN):
        super().__init__()
        conv, linear, relu = (layers[name] for name in ("conv", "linear", "relu"))
        self.layers = nn.Sequential(
            layers["identity"](),
            conv(1, 6, 5, bias=False),
            relu(),
            nn.MaxPool2d(2),
            conv(6, 16, 5, bias=False),
            relu(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            linear(400, 120),
            relu(),
            linear(120, 84),
            relu(),
            linear(84, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of images (N, 1, 32, 32)."""
        return self.layers(x)


class _Block(nn.Module):
    def __init__(self, layers: Layers, width: int, features: int, stride: int):
        super().__init__()
        conv = layers["conv"]
        self.inner = nn.Sequential(
            conv(width, features, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(features),
            layers["relu"](),
            conv(features, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features),
            layers["identity"](),
        )
        changes = stride != 1 or width != features
        self.shortcut = (
            nn.Sequential(
                conv(width, features, 1, stride=stride, bias=False),
                nn.BatchNorm2d(features),
                layers["identity"](),
            )
            if changes
            else nn.Identity()
        )
        self.relu = layers["relu"]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.shortcut(x) + self.inner(x))


class ResNet20(nn.Module):
    """Classify images of 32x32 with three channels."""

    def __init__(self, layers: Layers = PLAIN):
        super().__init__()
        stem = layers["conv"](3, 16, 3, padding=1, bias=False)
        parts = [layers["identity"](), stem, nn.BatchNorm2d(16), layers["relu"]()]
        width = 16
        for stage, features in enumerate((16, 32, 64)):
            for index in range(3):
                parts.append(_Block(layers, width, features, 2 if stage and not index else 1))
                width = features
        self.layers = nn.Sequential(*parts)
        self.head = layers["linear"](64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of images (N, 3, 32, 32)."""
        return self.head(self.layers(x).mean((2, 3)))
