"""Network surgery: a classifier of windows becomes a network over photographs of any size (paper A, section 2.2).

Each position of the result is the classifier on one window, "as if a sliding convolutional window was applied", and
what windows share is computed once.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

_POOLS = {nn.AdaptiveAvgPool2d: nn.AvgPool2d, nn.AdaptiveMaxPool2d: nn.MaxPool2d}
_POINTWISE = (nn.ReLU, nn.Dropout, nn.Identity)
_FAR = 1 << 10
"""Windows between two sizes whose maps tell the stride: a map's side may be rounded, so twice a window is too near."""


class SlidingWindow(nn.Module):
    """(N, C, H, W) -> logits (N, num_classes, h, w), a position a window.

    Position (i, j) is the window of side `window_px` that begins at pixel (i * stride_px, j * stride_px).
    """

    def __init__(self, body: nn.Module, head: nn.Sequential, window_px: int, stride_px: int) -> None:
        super().__init__()
        self.body, self.head, self.window_px, self.stride_px = body, head, window_px, stride_px

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(x))
        return x


def fully_convolutional(net: nn.Module, window_px: int = 512) -> SlidingWindow:
    """The network, in evaluation mode, that gives the logits of every window of `window_px`; all weights are copied.

    Adaptive pooling to k x k of a window's map of n x n becomes pooling of n / k at stride 1; the first Linear a k x k
    convolution of its reshaped weights, dilated by n / k (1 x 1 for k = 1); each further Linear a 1 x 1 convolution.
    Without pooling k is n. `net` may be any that torch.fx traces and whose head is that: [adaptive pooling,] flatten,
    Linear, then more of Linear, ReLU, Dropout. ValueError names another head, or a window that does not fit.

    On exactly one window the logits are those of `net`. On a larger photograph each is that of `net` on its window
    alone as long as no layer pads. Where layers pad, a lone window sees zeros beyond its border, a window inside a
    photograph what is there, and logits differ by that: the deeper the network, the more.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(net).eval())
    except (fx.proxy.TraceError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"net={type(net).__name__} cannot be traced by torch.fx: {reason}") from error
    modules = dict(traced.named_modules())
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    layers: list[nn.Module] = []
    node = output.args[0]
    while isinstance(modules.get(str(node.target)), (nn.Linear, *_POINTWISE)):
        layers.insert(0, modules[str(node.target)])
        node = node.all_input_nodes[0]
    if not any(isinstance(layer, nn.Linear) for layer in layers) or not _flattens(node, modules):
        raise ValueError(
            f"net={type(net).__name__}: its head must be [adaptive pooling,] flatten, Linear to become convolutions; "
            f"found {node.target!r} before {[type(layer).__name__ for layer in layers]}"
        )
    node = node.all_input_nodes[0]
    pool = modules.get(str(node.target))
    if type(pool) in _POOLS:
        node = node.all_input_nodes[0]
    body = _until(traced, node)
    (channels, n), (_, longer) = _map(body, window_px), _map(body, window_px + _FAR * window_px)
    k = _bins(pool) if type(pool) in _POOLS else n
    stride_px = _FAR * window_px // max(1, longer - n)
    if n % k or window_px % stride_px:
        raise ValueError(
            f"window_px={window_px} gives a map of {n} x {n}, which pooling to {k} x {k} and a step of {stride_px} px "
            f"do not part evenly; use a multiple of {k * stride_px}"
        )
    head = nn.Sequential() if type(pool) not in _POOLS else nn.Sequential(_POOLS[type(pool)](n // k, 1))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer = _convolution(layer, channels, k, n // k)
            channels, k, n = layer.out_channels, 1, 1
        head.append(layer)
    return SlidingWindow(body, head, window_px, stride_px).eval()


def _convolution(linear: nn.Linear, channels: int, k: int, dilation: int) -> nn.Conv2d:
    """A Linear on a flattened map, (channels, k, k), as a convolution."""
    if linear.in_features != channels * k * k:
        raise ValueError(f"Linear takes {linear.in_features} values, the window's map has {channels} x {k} x {k}")
    weight = linear.weight.detach()
    convolution = nn.Conv2d(
        channels, linear.out_features, k, dilation=dilation, bias=linear.bias is not None, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        convolution.weight.copy_(weight.reshape(convolution.weight.shape))
        if linear.bias is not None and convolution.bias is not None:
            convolution.bias.copy_(linear.bias)
    return convolution


def _flattens(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it makes (N, C, h, w) one vector an image."""
    layer = modules.get(str(node.target))
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    start, end = (node.args[i] if len(node.args) > i else node.kwargs.get(name, default)
                  for i, name, default in ((1, "start_dim", 0), (2, "end_dim", -1)))  # fmt: skip
    return node.target in (torch.flatten, "flatten") and (start, end) == (1, -1)


def _until(traced: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """The part of a network that makes `last`."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in traced.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is last:
            break
    graph.output(copies[last])
    return fx.GraphModule(traced, graph)


def _map(body: fx.GraphModule, size_px: int) -> tuple[int, int]:
    """Channels and side of the map of a square image; only shapes are computed."""
    first = next(m for m in body.modules() if isinstance(m, nn.Conv2d))
    image = torch.empty((1, first.in_channels, size_px, size_px), device="meta", dtype=first.weight.dtype)
    weights = {name: t.to("meta") for name, t in [*body.named_parameters(), *body.named_buffers()]}
    try:
        with torch.no_grad():
            _, channels, side, _ = functional_call(body, weights, (image,)).shape
    except RuntimeError as error:
        raise ValueError(f"a window of {size_px} px does not fit the network: {str(error).splitlines()[0]}") from error
    return channels, side


def _bins(pool: nn.Module | None) -> int:
    size = getattr(pool, "output_size", None)
    if isinstance(size, (tuple, list)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"adaptive pooling to {size} must be to a square, k x k")
    return size
