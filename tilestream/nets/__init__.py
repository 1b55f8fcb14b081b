"""Networks, the files that hold them, and surgery: paper A's residual network, paper B's U and D, ResNet-18/34/50."""

from .bag import ConvBoVW, ImageWordNet, WordNet
from .files import Model, build, convert, load_model, load_weights, save_model
from .residual import ResidualBlock, ResidualNet
from .resnet import ResNet, resnet18, resnet34, resnet50
from .surgery import SlidingWindow, fully_convolutional

__all__ = [
    "ConvBoVW", "ImageWordNet", "Model", "ResNet", "ResidualBlock", "ResidualNet", "SlidingWindow", "WordNet", "build",
    "convert", "fully_convolutional", "load_model", "load_weights", "resnet18", "resnet34", "resnet50", "save_model",
]  # fmt: skip
