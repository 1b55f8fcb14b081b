"""Networks, and the files that hold them: paper A's residual network, ResNet-18/34/50."""

from .files import Model, build, convert, load_model, load_weights, save_model
from .residual import ResidualBlock, ResidualNet
from .resnet import ResNet, resnet18, resnet34, resnet50

__all__ = [
    "Model", "ResNet", "ResidualBlock", "ResidualNet", "build", "convert", "load_model", "load_weights", "resnet18",
    "resnet34", "resnet50", "save_model",
]  # fmt: skip
