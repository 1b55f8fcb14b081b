"""The peer, lightstream 1.0.7, in an environment of its own: all gradients of weights, the trunk of a ResNet streamed.

    python3.11 -m venv peer
    peer/bin/pip install -c constraints.txt torch lightstream==1.0.7 lightning numpy psutil pydantic safetensors
    peer/bin/pip install --no-deps -e .
    peer/bin/python benchmarks/peer.py --net resnet18 --size 4096x4096 --tile 2048

The constraints pin torch: a looser request fetches gigabytes of CUDA libraries. torchvision is not needed: the network
is `tilestream.nets`'. `engine.py --task weights --lightstream peer/bin/python:2048` makes this a row of its table.

Prints one line of JSON with the numbers of `engine.measure`. Batch norm is frozen, as lightstream wants it, so its
scales and shifts get no gradient. Mean pooling and the linear layer follow on the whole map, un-streamed. Setting up,
a pass of lightstream's over one tile, comes before the clock starts. FLOPs count the tiles of both of its sweeps, each
with its borders, and weight gradients once a pixel. Between its buffers glibc leaves gaps, which count as memory:
MALLOC_MMAP_THRESHOLD_=65536 before the command takes them out (ours manages its own).

--check compares with plain autograd. In float32 a ReLU near 0 may open in one and not in the other, which ResNet-50's
untrained layers blow up: 2e-4 of its weight gradients, 5e-3 of the image's; with --float64 it is 5e-16 and 0. (This
file is not called lightstream.py, or it would import itself.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

import numpy as np
import torch
from engine import convolution_rate, loss, useful_flops, watched
from lightstream.core.constructor import StreamingConstructor
from lightstream.core.utils import freeze_normalization_layers
from torch import Tensor, nn

import tilestream as ts
from tilestream.engine.allocator import trim

STRIDE_PX = 32
SMALLEST_TILE_PX = 1024
"""Below it, 768 to 992 px were tried, lightstream finds wrong borders for a tile's gradients, and fails."""


class Peer:
    """A ResNet whose trunk lightstream streams; `saliency` asks for the gradient of the image as well."""

    def __init__(self, name: str, tile_px: int, saliency: bool) -> None:
        trunk, self.head = halves(name)
        with contextlib.redirect_stdout(sys.stderr):
            constructor = StreamingConstructor(
                trunk,
                tile_px,
                verbose=False,
                saliency=saliency,
                normalize_on_gpu=False,
                add_keep_modules=[nn.BatchNorm2d],
            )
            constructor.statistics_on_cpu = False  # True moves the network to CUDA when it is done, whatever there is
            self.trunk = constructor.prepare_streaming_model()
        freeze_normalization_layers(self.trunk)
        self.tiles = {False: 0, True: 0}  # those that went forward only, and those that also went back
        self.trunk.stream_module.register_forward_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.tiles[torch.is_grad_enabled()] += 1

    def __call__(self, image: Tensor) -> Tensor:
        """Logits of (1, 3, H, W); adds to every `.grad`."""
        features = self.trunk(image).requires_grad_()
        logits: Tensor = self.head(features)
        loss(logits).backward()
        self.trunk.backward(image, features.grad)
        return logits.detach()

    def reset(self) -> None:
        """Forgets the gradients and the tiles counted."""
        self.tiles = dict.fromkeys(self.tiles, 0)
        for parameter in (*self.trunk.parameters(), *self.head.parameters()):
            parameter.grad = None

    def gradients(self) -> dict[str, Any]:
        """By the names of `halves`; those of frozen batch norm are not there."""
        net = nn.ModuleDict({"trunk": self.trunk.stream_module, "head": self.head})
        return {n: p.grad for n, p in net.named_parameters() if p.requires_grad}


def halves(name: str) -> tuple[nn.Module, nn.Module]:
    """Trunk and head of the network that `engine.measure` builds, with the same weights each time."""
    torch.manual_seed(0)
    *trunk, pool, linear = ts.nets.build(name).children()
    return nn.Sequential(*trunk), nn.Sequential(pool, nn.Flatten(), linear)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs it once, prints the numbers and returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18", choices=["resnet18", "resnet50"])
    parser.add_argument("--size", default="4096x4096", help="HEIGHTxWIDTH")
    parser.add_argument("--tile", type=int, default=2048, help="px, a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--saliency", action="store_true", help="the gradient of the image as well")
    parser.add_argument("--check", action="store_true", help="afterwards, plain autograd: relative errors against it")
    parser.add_argument("--float64", action="store_true", help="what --check needs to tell rounding from an error")
    options = parser.parse_args(arguments)
    height, width = size = tuple(map(int, options.size.split("x")))
    if options.tile < SMALLEST_TILE_PX:
        parser.error(f"--tile={options.tile} must be at least {SMALLEST_TILE_PX}: lightstream fails below it")
    if any(side < options.tile or (side - options.tile) % STRIDE_PX for side in size):
        parser.error(f"--size={options.size} must be --tile={options.tile} and a multiple of {STRIDE_PX} px more")
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64 if options.float64 else torch.float32)
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, height, width), np.float32))
    image = image.to(torch.get_default_dtype())
    peer = Peer(options.net, options.tile, options.saliency)
    peer(image[..., :256, :256].contiguous())  # libraries load before the clock starts
    peer.reset()
    trim()  # what setting up took and freed would hide what the run takes
    found: list[Tensor] = []
    seconds, bytes_ = watched(lambda: found.append(peer(image)))
    once, back = (peer.tiles[grad] * options.tile**2 / (height * width) for grad in (False, True))
    result = {
        "seconds": seconds,
        "bytes": bytes_,
        "predicted_bytes": 0,
        "overhead": (once + 2 * back + 1) / 3,
        "useful_gflops": useful_flops(ts.nets.build(options.net), (height, width), weights=True) / seconds / 1e9,
        "convolution_gflops": convolution_rate(),
    }
    if options.check:
        result |= errors(options.net, peer, image, found[0])
    print(json.dumps(result))
    return result


def errors(name: str, peer: Peer, image: Tensor, logits: Tensor) -> dict[str, float]:
    """|got - plain| / |plain|, 2-norms: of the logits, of the worst weight gradient, of the gradient of the image."""
    trunk, head = halves(name)
    image = image.requires_grad_()
    plain = head(trunk(image))
    loss(plain).backward()
    parameters = dict(nn.ModuleDict({"trunk": trunk, "head": head}).named_parameters())
    found = {
        "relative_error_logits": _error(logits, plain.detach()),
        "relative_error_weights": max(_error(g, parameters[n].grad) for n, g in peer.gradients().items()),
    }
    if peer.trunk.gather_input_gradient:
        found["relative_error_image"] = _error(peer.trunk.saliency_map, image.grad)
    return found


def _error(got: Any, want: Any) -> float:
    return float((got - want).norm() / want.norm())


if __name__ == "__main__":
    main()
