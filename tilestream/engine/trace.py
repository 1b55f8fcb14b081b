"""From a module to a list of streamable operations, a global pooling, and a head.

torch.fx records the network's graph. Its trunk, all that happens on maps, is turned into `Operation`s; what follows the
global pooling sees small vectors only and is run as it stands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import operations as op
from .operations import Operation

Pooling = Literal["average", "max"]


@dataclass
class Node:
    """A step of the trunk: `operation` over the values named in `inputs`; `path` is the module it came from."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    path: str
    channels: int = 0
    stride: tuple[int, int] = (1, 1)
    """Image pixels between neighbours on this map, (y, x)."""


@dataclass
class Network:
    """A traced network: `nodes` in order, from the image (the value named `image`) to the maps that are pooled."""

    image: str
    channels: int
    nodes: list[Node]
    pooled: dict[str, tuple[str, Pooling]] = field(default_factory=dict)
    """For each pooling node of the head the trunk value it pools, and how."""
    head: nn.Module = field(default_factory=nn.Identity)
    """Takes the pooled values, (1, C, 1, 1) each in order of `pooled`, gives the logits (1, num_classes)."""
    head_is_linear: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def users(self) -> dict[str, int]:
        """How many nodes or poolings read each value."""
        counts = dict.fromkeys([self.image, *(n.name for n in self.nodes)], 0)
        for name in [i for n in self.nodes for i in n.inputs] + [value for value, _ in self.pooled.values()]:
            counts[name] += 1
        return counts


MODULES: dict[type[nn.Module], Callable[[Any], Operation | None]] = {
    nn.Conv2d: op.Convolution,
    nn.BatchNorm2d: op.batch_norm,
    nn.ReLU: lambda m: op.relu(),
    nn.Identity: lambda m: None,
    nn.Dropout: lambda m: None,
    nn.Dropout2d: lambda m: None,
    nn.MaxPool2d: lambda m: op.max_pool(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices),
    nn.AvgPool2d: lambda m: op.average_pool(
        m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
}
"""Modules that can be streamed, and how; None where the result is the input itself."""


def _add(x: Any, y: Any, *, alpha: float = 1) -> Operation:
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or alpha != 1:
        raise ValueError("only the addition of two maps can be streamed")
    return op.add()


def _relu(x: Any, inplace: bool = False) -> Operation:
    return op.relu()


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    if training:
        raise ValueError("dropout(training=True) is random; pass training=self.training")


def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Operation:
    sizes = tuple(pad) if all(isinstance(p, int) for p in pad) else ()
    if mode != "constant" or value or len(sizes) != 6 or any(sizes[:4]) or min(sizes) < 0:
        raise ValueError(
            f"pad={pad} mode={mode!r} cannot be streamed; only zero-padding of channels, (0, 0, 0, 0, before, after)"
        )
    return op.channel_pad(sizes[4], sizes[5])


FUNCTIONS: dict[Any, Callable[..., Operation | None]] = {
    torch.add: _add,
    operator.add: _add,
    operator.iadd: _add,
    "add": _add,
    "add_": _add,
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    "relu": _relu,
    "relu_": _relu,
    F.dropout: _dropout,
    F.pad: _pad,
    F.max_pool2d: lambda x, *args, **kwargs: op.max_pool(*args, **kwargs),
    torch.max_pool2d: lambda x, *args, **kwargs: op.max_pool(*args, **kwargs),
    F.avg_pool2d: lambda x, *args, **kwargs: op.average_pool(*args, **kwargs),
    "contiguous": lambda x, memory_format=None: None,
}
WRITERS = (operator.iadd, "add_", torch.relu_, "relu_")
"""Functions that overwrite their first argument; others do so with inplace=True."""
POOL_FUNCTIONS: dict[Any, Pooling] = {F.adaptive_avg_pool2d: "average", F.adaptive_max_pool2d: "max"}
POOL_MODULES: dict[type[nn.Module], Pooling] = {nn.AdaptiveAvgPool2d: "average", nn.AdaptiveMaxPool2d: "max"}
LINEAR_HEAD = (nn.Linear, nn.Flatten, nn.Identity, nn.Dropout)
RESHAPES = (torch.flatten, torch.squeeze, "flatten", "view", "reshape", "squeeze", "size", getattr, operator.getitem)


def trace(net: nn.Module) -> Network:
    """Traces `net`, which must be in evaluation mode, and checks that every operation can be streamed exactly.

    Raises ValueError that names the module's path and the operation, for anything else.
    """
    for path, module in net.named_modules():
        if module.training:
            raise ValueError(f"the network is in train mode at {path or '(root)'}; call net.eval() first")
    dtypes = {p.dtype for p in net.parameters()}
    if len(dtypes) > 1 or torch.bfloat16 in dtypes:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"the network's parameters are {names}; call net.float() or net.double() first")
    try:
        graph = _Tracer(param_shapes_constant=True).trace(net)
    except Exception as error:  # fx raises many kinds, all of them about the user's forward code
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{type(net).__name__}.forward cannot be traced by torch.fx: {why}") from error
    return _Builder(net, graph).build()


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


class _Proxy(fx.Proxy):
    """Records `x += y` as it is; torch.fx records `x + y`, although others who hold x see it change."""

    __iadd__, __isub__ = _recorded(operator.iadd), _recorded(operator.isub)
    __imul__, __itruediv__ = _recorded(operator.imul), _recorded(operator.itruediv)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Builder:
    """Walks the recorded graph once, sorting its nodes into trunk, pooling and head."""

    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        self.net, self.graph = net, graph
        self.modules = dict(net.named_modules())
        parameter = next(iter(net.parameters()), torch.zeros(()))
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise ValueError(
                f"{type(net).__name__}.forward takes {len(inputs)} inputs; a streamed network takes one image"
            )
        self.trunk = {inputs[0]: inputs[0].name}  # values that are maps, under the names they have in the network
        self.head: set[fx.Node] = set()
        self.linear = True
        self.network = Network(inputs[0].name, 0, [], dtype=parameter.dtype, device=parameter.device)

    def build(self) -> Network:
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            maps = [n for n in node.all_input_nodes if n in self.trunk]
            if not maps:
                self.head.add(node)
                self.linear = self.linear and self._is_linear(node)
            elif len(maps) != len(node.all_input_nodes):
                raise self._refuse(node, "mixes a map with a value that is none")
            elif (pooling := self._pooling(node)) is not None:
                self._refuse_hooks(node)
                self.network.pooled[node.name] = (self.trunk[maps[0]], pooling)
                self.head.add(node)
            else:
                self._append(node)
        if not self.network.pooled:
            raise ValueError(
                f"{type(self.net).__name__} has no global pooling (AdaptiveAvgPool2d(1), AdaptiveMaxPool2d(1)); "
                "maps as results cannot be streamed"
            )
        self._prune()
        self._measure_channels()
        self.network.head, self.network.head_is_linear = self._head(), self.linear
        self._check_logits()
        return self.network

    def _target(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else node.target

    def _pooling(self, node: fx.Node) -> Pooling | None:
        target = self._target(node)
        if isinstance(target, nn.Module):
            kind, size = POOL_MODULES.get(type(target)), getattr(target, "output_size", None)
        else:
            kind = POOL_FUNCTIONS.get(target)
            size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        if kind is None:
            return None
        if size not in (1, (1, 1), [1, 1]):
            raise self._refuse(node, f"pools to {size}; only pooling to 1 x 1 can be streamed")
        if getattr(target, "return_indices", False):
            raise self._refuse(node, "returns indices, which cannot be streamed")
        return kind

    def _append(self, node: fx.Node) -> None:
        target = self._target(node)
        is_module = isinstance(target, nn.Module)
        builder = MODULES.get(type(target)) if is_module else FUNCTIONS.get(target)
        if builder is None:
            raise self._refuse(node, "cannot be streamed exactly")
        try:
            operation = builder(target) if is_module else builder(*node.args, **node.kwargs)
        except (ValueError, TypeError) as error:
            raise self._refuse(node, str(error)) from error
        self._refuse_hooks(node)
        inputs = tuple(self.trunk[n] for n in node.args if isinstance(n, fx.Node))
        if operation is None:
            self.trunk[node] = inputs[0]
            return
        if isinstance(target, nn.BatchNorm2d) and self._folds(node):
            producer = next(n for n in self.network.nodes if n.name == inputs[0])
            assert isinstance(producer.operation, op.Convolution)
            producer.operation.fold(target)
            self.trunk[node] = producer.name
            return
        if self._overwrites(node):  # who reads the input from now on, under whatever name, sees the result
            self.trunk.update({other: node.name for other, value in self.trunk.items() if value == inputs[0]})
        self.trunk[node] = node.name
        self.network.nodes.append(Node(node.name, operation, inputs, self._path(node)))

    def _folds(self, node: fx.Node) -> bool:
        """Whether a batch norm directly follows a convolution whose result nobody else reads."""
        (source,) = node.all_input_nodes
        return isinstance(self._target(source), nn.Conv2d) and len(source.users) == 1 and source.op == "call_module"

    def _overwrites(self, node: fx.Node) -> bool:
        target = self._target(node)
        if isinstance(target, nn.Module):
            return bool(getattr(target, "inplace", False))
        inplace = node.kwargs.get("inplace", node.args[1] if target is F.relu and len(node.args) > 1 else False)
        return target in WRITERS or bool(inplace)

    def _refuse_hooks(self, node: fx.Node) -> None:
        """Hooks are code of the user's that sees whole maps; pruning and old-style weight norm put them there too."""
        target = self._target(node)
        if isinstance(target, nn.Module) and _has_hooks(target):
            raise self._refuse(node, "has hooks, which cannot be streamed; remove them first")

    def _prune(self) -> None:
        """Drops nodes that no pooling depends on."""
        wanted = {value for value, _ in self.network.pooled.values()}
        for node in reversed(self.network.nodes):
            if node.name in wanted:
                wanted.update(node.inputs)
        self.network.nodes = [n for n in self.network.nodes if n.name in wanted]

    def _measure_channels(self) -> None:
        network = self.network
        first = next((n for n in network.nodes if isinstance(n.operation, op.Convolution)), None)
        if first is None:
            raise ValueError(
                f"{type(self.net).__name__} has no convolution, so the number of input channels is not known"
            )
        assert isinstance(first.operation, op.Convolution)
        added = {network.image: 0}  # channels that were padded on between the image and that convolution
        for node in network.nodes[: network.nodes.index(first)]:
            added[node.name] = node.operation.channels(max(added[name] for name in node.inputs))
        network.channels = first.operation.weight.shape[1] * first.operation.groups - added[first.inputs[0]]
        channels, strides = {network.image: network.channels}, {network.image: (1, 1)}
        for node in network.nodes:
            step = node.operation.window.stride if isinstance(node.operation, op.Windowed) else (1, 1)
            y, x = strides[node.inputs[0]]
            # an addition may repeat a map of one channel over all those of the other
            node.channels = channels[node.name] = node.operation.channels(max(channels[name] for name in node.inputs))
            node.stride = strides[node.name] = (y * step[0], x * step[1])

    def _is_linear(self, node: fx.Node) -> bool:
        target = self._target(node)
        if isinstance(target, nn.Module):
            return type(target) in LINEAR_HEAD and not _has_hooks(target)
        return target in RESHAPES

    def _head(self) -> nn.Module:
        """The graph after the poolings, with a placeholder where each pooling stood."""
        graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            if node.name in self.network.pooled:
                copied[node] = graph.placeholder(node.name)
        for node in self.graph.nodes:
            if node.op == "output":
                if any(n in self.trunk for n in node.all_input_nodes):
                    raise ValueError(f"{type(self.net).__name__}.forward returns a map; it must give logits alone")
                graph.output(fx.map_arg(node.args[0], lambda n: copied[n]))
            elif node not in copied and (node in self.head or node.op == "get_attr"):
                copied[node] = graph.node_copy(node, lambda n: copied[n])
        return fx.GraphModule(self.net, graph).eval()

    def _check_logits(self) -> None:
        channels = {self.network.image: self.network.channels, **{n.name: n.channels for n in self.network.nodes}}
        pooled = [
            torch.zeros(1, channels[value], 1, 1, dtype=self.network.dtype, device=self.network.device)
            for value, _ in self.network.pooled.values()
        ]
        with torch.no_grad():
            logits = self.network.head(*pooled)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            raise ValueError(f"{type(self.net).__name__}.forward gives {shape}; it must give logits (N, num_classes)")

    def _path(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        return list(stack)[-1] if stack else ""

    def _refuse(self, node: fx.Node, why: str) -> ValueError:
        target = self._target(node)
        what = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", str(target))
        return ValueError(f"{self._path(node) or '(root)'}: {what}: {why}")


def _has_hooks(module: nn.Module) -> bool:
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
    )


def head_gradient(network: Network, pooled: list[Tensor], target: int) -> list[Tensor]:
    """d logit[target] / d pooled, (1, C, 1, 1) each."""
    leaves = [p.detach().requires_grad_() for p in pooled]
    with torch.enable_grad():
        logits = network.head(*(leaf.clone() for leaf in leaves))  # clones, for a head may write on them
        if not 0 <= target < logits.shape[1]:
            raise ValueError(f"target={target} must be in [0, {logits.shape[1]}): the network has that many classes")
        return list(torch.autograd.grad(logits[0, target], leaves, allow_unused=True, materialize_grads=True))
