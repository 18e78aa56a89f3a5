"""Models in plain flax.linen: nothing in them knows of quantization."""

from experiments.models.efficientnet import EfficientNetLite0
from experiments.models.lenet import LeNet5
from experiments.models.mobilenet import MobileNetV2
from experiments.models.recurrent import RowLSTM
from experiments.models.resnet import ResNet18, ResNet20, ResNet50
from experiments.models.tiny import DSCNN, DenseAutoencoder, MobileNetV1, ResNet8
from experiments.models.vit import MLPMixer, VisionTransformer

__all__ = [
    "DSCNN",
    "DenseAutoencoder",
    "EfficientNetLite0",
    "LeNet5",
    "MLPMixer",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet8",
    "ResNet18",
    "ResNet20",
    "ResNet50",
    "RowLSTM",
    "VisionTransformer",
]
