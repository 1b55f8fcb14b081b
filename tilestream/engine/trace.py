"""From a module to operations on maps, reductions of maps to vectors, and a graph of small vectors.

torch.fx records the network. What happens on maps becomes `Node`s with an `Operation`; what reduces a whole map (global
pooling, statistics of norms, softmax over positions) becomes a `Reduction`; all else sees small vectors and runs as it
stands. A map that depends on a vector has to wait for that vector's reductions, so every value has a `level`.
"""

from __future__ import annotations

import operator
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from tilestream.geometry import Extent

from . import supported
from .operations import Convolution, Operation, TransposedConvolution
from .reductions import Reduction
from .supported import Stride

Precision = Literal["bf16"]
MOST_CHANNELS = 1025


@dataclass
class Node:
    """A step over maps: `operation` over the maps named in `inputs` and the vectors named in `vectors`.

    `path` is the module it came from. Where the operation depends on the image's size it comes from `make`.
    """

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    path: str = ""
    vectors: tuple[str, ...] = ()
    channels: int = 0
    stride: Stride = (1, 1)
    """Image pixels between neighbours on this map, (y, x)."""
    level: int = 0
    make: Callable[[Mapping[str, Any], tuple[Extent, ...]], Operation] | None = None


@dataclass
class Vector:
    """A step over small vectors (or shapes): `call` takes those computed before, by name."""

    name: str
    call: Callable[[Mapping[str, Any]], Any]
    level: int
    static: bool
    """Whether it depends on shapes and constants alone."""
    inputs: tuple[str, ...] = ()
    """The vectors and maps (whose shapes it asks for) that it reads."""
    writes: bool = False
    """Whether it writes on what it reads."""


@dataclass
class Network:
    """A traced network: `nodes` in order of their levels, `reductions` and `vectors` by level as well."""

    image: str
    channels: int = 0
    nodes: list[Node] = field(default_factory=list)
    reductions: dict[str, Reduction] = field(default_factory=dict)
    vectors: list[Vector] = field(default_factory=list)
    output: str = ""
    """The vector of logits, or the map, that the network returns."""
    linear: bool = True
    """Whether all from the reductions to the logits is linear, and all reductions are means of maps of level 0."""
    clamped: bool = False
    """Whether a rectifier is among the vectors, where only the gradient's own rule is known."""
    parameters: list[nn.Parameter] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    """Of parameters, vectors and results."""
    map_dtype: torch.dtype = torch.float32
    """Of maps: the same, or a shorter one where that was asked for by name."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    extents: dict[str, Extent] = field(default_factory=dict)
    """The extent of every map; empty until `bind`."""

    @property
    def dense(self) -> bool:
        """Whether the network returns a map."""
        return self.output in self.channels_of()

    def channels_of(self) -> dict[str, int]:
        return {self.image: self.channels, **{n.name: n.channels for n in self.nodes}}

    def of(self, channels: int) -> Network:
        """The network for images of so many channels; ValueError says what reads another number."""
        known, nodes = {self.image: channels}, []
        for node in self.nodes:
            try:
                known[node.name] = node.operation.channels(*(known[name] for name in node.inputs))
            except ValueError as error:
                raise ValueError(f"image of {channels} channels: {node.path or node.name}: {error}") from None
            nodes.append(replace(node, channels=known[node.name]))
        reductions = {name: replace(r, channels=known[r.source]) for name, r in self.reductions.items()}
        network = replace(self, channels=channels, nodes=nodes, reductions=reductions)
        if not any(v.static for v in self.vectors):  # else once the image's extent is known
            check_vectors(network, "the network")
        return network

    def strides(self) -> dict[str, Stride]:
        return {self.image: (1, 1), **{n.name: n.stride for n in self.nodes}}

    def bind(self, image: Extent) -> Network:
        """The network for an image of this extent; ValueError names the module that it is too small for."""
        extents, bound = {self.image: image}, dict[str, Node]()
        channels, nodes = self.channels_of(), {n.name: n for n in self.nodes}
        statics = {v.name: v for v in self.vectors if v.static}

        def visit(name: str) -> Extent:
            """The extent of a map: shapes may be asked of maps of any level."""
            if name not in extents:
                node = nodes[name]
                inputs = tuple(visit(each) for each in node.inputs)
                try:
                    bound[name] = node
                    if node.make is not None:
                        made = node.make(known, inputs).cast(self.map_dtype)
                        bound[name] = replace(node, operation=made)
                    extents[name] = bound[name].operation.extent(*inputs)
                except ValueError as error:
                    where = f"image of {image[0]} x {image[1]} px: {node.path or node.name}"
                    raise error if str(error).startswith("image of ") else ValueError(f"{where}: {error}") from None
            return extents[name]

        class Known(dict[str, Any]):
            """Shapes and what follows from them."""

            def __missing__(self, name: str) -> Any:
                known = statics[name].call(self) if name in statics else torch.Size((1, channels[name], *visit(name)))
                return self.setdefault(name, known)

        known = Known()
        for name in nodes:  # in order, so that the recursion stays flat
            visit(name)
        network = replace(self, nodes=[bound[name] for name in nodes], extents=extents)
        network.vectors = [replace(v, call=partial(_constant, known[v.name])) if v.static else v for v in self.vectors]
        if any(v.static for v in self.vectors):
            check_vectors(network, "the network")
        return network

    def evaluate(self, env: dict[str, Any], level: int, versions: dict[str, int]) -> None:
        """Computes the vectors of this level into `env`, which holds the reductions below it.

        `versions` gets how often each had been written on by then.
        """
        for vector in self.vectors:
            if vector.level == level or (vector.static and vector.name not in env):
                env[vector.name] = vector.call(env)
                versions[vector.name] = getattr(env[vector.name], "_version", 0)

    def levels(self) -> int:
        return 1 + max([v.level for v in self.vectors] + [n.level for n in self.nodes])


def _constant(value: Any, _: Mapping[str, Any]) -> Any:
    return value


@dataclass(frozen=True)
class Recorded:
    """What torch.fx sees of a network's forward code.

    `constants` are the parameters, buffers and other tensors that it reads, by target. `settings` equals
    that of another recording of the same network only if the code did the same, whatever it read to decide what to do.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    settings: list[Any]


_RECORDING = threading.RLock()
"""torch.fx changes nn.Module itself while it records."""


def record(net: nn.Module) -> Recorded:
    """Runs the forward code of `net`, which must be in evaluation mode, on a stand-in for an image."""
    for path, module in net.named_modules():
        if module.training:
            raise ValueError(f"the network is in train mode at {path or '(root)'}; call net.eval() first")
    try:
        with _RECORDING, unchanged(net), torch.enable_grad():
            graph = _Tracer(param_shapes_constant=True).trace(net)
            read = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr")
            constants = {name: operator.attrgetter(name)(net) for name in read}
    except Exception as error:  # fx raises many kinds, all of them about the user's forward code
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{type(net).__name__}.forward cannot be traced by torch.fx: {why}") from error
    settings: list[Any] = [(n.op, n.target, repr(n.args), repr(n.kwargs)) for n in graph.nodes]
    parameters = set(map(id, net.parameters()))
    settings += [(name, content(value)) for name, value in constants.items() if id(value) not in parameters]
    settings += [_settings(path, module) for path, module in net.named_modules()]
    return Recorded(graph, constants, settings)


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Takes away again what forward code leaves in its modules: maps, counters, constants of torch.fx."""
    kept = [(d, dict(d)) for m in net.modules() for d in (vars(m), m._parameters, m._buffers, m._modules)]
    try:
        yield
    finally:
        for now, before in kept:
            for name in now.keys() - before.keys():
                del now[name]
            now.update({name: value for name, value in before.items() if now.get(name) is not value})


def _settings(path: str, module: nn.Module) -> Any:
    """What torch.fx does not see of a module: hooks, and the attributes of those that it does not look into."""
    leaf = _Tracer().is_leaf_module(module, path)
    own = {k: v for k, v in vars(module).items() if k[0] != "_"} if leaf else {}
    plain = (bool, int, float, str, tuple, list, type(None))
    seen = [(k, content(v) if isinstance(v, Tensor) else repr(v) if isinstance(v, plain) else v if callable(v) else 0)
            for k, v in own.items()]  # fmt: skip
    return path, type(module), type(module).forward, vars(module).get("forward"), supported.has_hooks(module), seen


def content(t: Any) -> Any:
    """What tells a tensor from one with other values: writes through `.data` count no version."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_nested or t.is_conj():
        return id(t), getattr(t, "_version", 0) if not getattr(t, "is_inference", bool)() else 0
    if t.device.type == "meta":
        return t.shape, t.dtype
    if t.is_cuda:  # there: a sum with odd factors by position
        bits = t.detach().contiguous().view(-1)
        bits = bits.view({1: torch.uint8, 2: torch.int16}.get(t.element_size(), torch.int32))
        odd = torch.arange(1, 2 * len(bits), 2, device=t.device).to(bits.dtype)
        return t.shape, t.dtype, t.requires_grad, int((bits * odd).sum(dtype=torch.int64))
    values: Any = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return t.shape, t.dtype, t.requires_grad, zlib.crc32(values)


def trace(net: nn.Module, precision: Precision | None = None, recorded: Recorded | None = None) -> Network:
    """Traces `net`, which must be in evaluation mode, and checks that every operation can be streamed exactly.

    Maps have the dtype of the parameters, or bfloat16 for `precision` "bf16".

    Raises ValueError that names the module's path and the operation, for anything else.
    """
    if precision not in (None, "bf16"):
        raise ValueError(f"precision={precision!r} is not known; use 'bf16', or None for that of the parameters")
    dtypes = {p.dtype for p in net.parameters()}
    if len(dtypes) > 1 or dtypes & {torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"the network's parameters are {names}; call net.float() or net.double() first")
    network = _Builder(net, recorded or record(net)).build()
    network.map_dtype = torch.bfloat16 if precision == "bf16" else network.dtype
    for node in network.nodes:
        node.operation.cast(network.map_dtype)
    return network


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


class _Proxy(fx.Proxy):
    """Records `x += y` as it is; torch.fx records `x + y`, although others who hold x see it change."""

    __iadd__, __isub__ = _recorded(operator.iadd), _recorded(operator.isub)
    __imul__, __itruediv__ = _recorded(operator.imul), _recorded(operator.itruediv)
    __ipow__, __ifloordiv__, __imod__ = (_recorded(f) for f in (operator.ipow, operator.ifloordiv, operator.imod))


class _Tracer(fx.Tracer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thread = threading.get_ident()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise ValueError("gradients are switched off inside it; switch them off around it, or use .detach()")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, module: nn.Module, forward: Callable[..., Any], *given: Any) -> Any:
        if threading.get_ident() != self.thread:  # which runs a network beside this one
            return forward(*given[0], **given[1])
        return super().call_module(module, forward, *given)

    def getattr(self, name: str, value: Any, cache: dict[str, fx.Proxy]) -> Any:
        return super().getattr(name, value, cache) if threading.get_ident() == self.thread else value


def check_vectors(network: Network, what: str) -> None:
    """Runs the vectors on zeros: what comes out must be logits, what goes back to maps must be one value a channel."""
    channels = network.channels_of()
    env: dict[str, Any] = {
        name: r.shaped(torch.zeros(r.size(), dtype=network.dtype, device=network.device))
        for name, r in network.reductions.items()
    }
    versions = dict.fromkeys(env, 0)
    try:
        with torch.no_grad():
            for level in range(network.levels()):
                network.evaluate(env, level, versions)
    except Exception as error:  # of the user's code, whatever it is
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{what}: what it computes of pooled values fails on those that are streamed: {why}"
        ) from error
    levels = {name: r.level for name, r in network.reductions.items()} | {v.name: v.level for v in network.vectors}
    late = {i for v in network.vectors for i in v.inputs if v.level > levels.get(i, v.level)}
    for name in late.union(*(n.vectors for n in network.nodes)):
        if isinstance(env[name], Tensor) and env[name]._version != versions[name]:
            raise ValueError(f"{what}: {name}, computed of pooled values, is overwritten, and maps or others that wait "
                             "for maps read it; use the form that is not in place")  # fmt: skip
    for node in network.nodes:
        for name in node.vectors:
            if isinstance(value := env[name], Tensor) and not _fits(value.shape, node.operation.vectors, node.channels):
                raise ValueError(
                    f"{node.path or node.name}: a map of {node.channels} channels meets a vector of shape "
                    f"{tuple(value.shape)}; only one value a channel, (N, C, 1, 1), can be streamed"
                )
    if network.output in channels:
        return
    logits = env[network.output]
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        raise ValueError(f"{what}.forward gives {shape}; it must give logits (N, num_classes) or a map")


def _fits(shape: torch.Size, layout: str, channels: int) -> bool:
    """Whether a vector holds one value a channel, or one for all, beside a map laid out like this."""
    where = {"map": -3, "flat": -2, "last": -1, "own": 0}[layout]
    if layout == "own":
        return True
    sides, most = dict(enumerate(reversed(shape), 1)), 3 if layout == "flat" else 4
    return len(shape) <= most and all(n in ((1, channels) if -i == where else (1,)) for i, n in sides.items())


class _Builder:
    """Walks the recorded graph once, sorting its nodes into maps, reductions and vectors."""

    def __init__(self, net: nn.Module, recorded: Recorded) -> None:
        self.net, self.graph, self.constants = net, recorded.graph, recorded.constants
        self.modules = dict(net.named_modules())
        floats = (b for b in net.buffers() if b.is_floating_point())
        parameter = next(chain(net.parameters(), floats), torch.zeros(()))
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise ValueError(
                f"{type(net).__name__}.forward takes {len(inputs)} inputs; a streamed network takes one image"
            )
        image = inputs[0].name
        self.maps: dict[fx.Node, str] = {inputs[0]: image}
        """fx nodes that are maps, and the names of their values in the network."""
        self.flat: set[fx.Node] = set()
        """Maps whose positions were flattened into one dimension."""
        self.arranged: dict[fx.Node, supported.Arrangement] = {}
        """Maps that the code sees with their dimensions in another order, or their channels in groups."""
        self.views: dict[str, str] = {}
        """Maps that share memory with others in the user's code, by one of them: all change when one is overwritten."""
        self.tuples: dict[fx.Node, list[str]] = {}
        self.levels: dict[str, int] = {image: 0}
        self.static: set[fx.Node] = set()
        self.network = Network(image, dtype=parameter.dtype, device=parameter.device)
        self.network.parameters = list(net.parameters())

    def build(self) -> Network:
        self._refuse_outer_hooks()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                self._output(node)
                continue
            self._refuse_hidden_leaves(node)
            maps = [n for n in node.all_input_nodes if n in self.maps]
            if any(n in self.tuples for n in node.all_input_nodes):
                self._element(node)
            elif not maps:
                self._vector(node)
            else:
                self._refuse_hooks(node)
                try:
                    supported.add(_Context(self, node))
                except (ValueError, TypeError) as error:
                    raise self.refusal(node, str(error)) from error
        self._prune()
        self.network.nodes.sort(key=lambda n: n.level)
        return self._measured()

    def target(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else node.target

    def _vector(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if inputs and all(n in self.static for n in inputs):
            self.static.add(node)
        level = max((self.levels[n.name] for n in inputs), default=0)
        self.levels[node.name] = level
        if inputs and node not in self.static:
            self.network.linear = self.network.linear and supported.is_linear(self.target(node))
            self.network.clamped = self.network.clamped or supported.is_relu(self.target(node))
        read = tuple(n.name for n in inputs)
        static, writes = node in self.static, supported.is_inplace(self.target(node), node.kwargs)
        self.network.vectors.append(Vector(node.name, self._caller(node), level, static, read, writes))

    def _caller(self, node: fx.Node) -> Callable[[Mapping[str, Any]], Any]:
        net, target, constants = self.net, node.target, self.constants

        def call(env: Mapping[str, Any]) -> Any:
            args: Any = fx.map_arg(node.args, lambda n: env[n.name])
            kwargs: Any = fx.map_arg(node.kwargs, lambda n: env[n.name])
            if node.op == "get_attr":
                return constants[str(target)]
            if node.op == "call_module":
                return net.get_submodule(str(target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(target))(*args[1:], **kwargs)
            return target(*args, **kwargs)  # type: ignore[operator]

        return call

    def _element(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        if node.target is not operator.getitem or not isinstance(node.args[1], int):
            raise self.refusal(node, "takes several maps at once, which cannot be streamed")
        self.maps[node] = self.tuples[source][node.args[1]]

    def _output(self, node: fx.Node) -> None:
        result, name = node.args[0], type(self.net).__name__
        if not isinstance(result, fx.Node) or result in self.tuples:
            what = type(result).__name__
            raise ValueError(f"{name}.forward gives {what}; it must give logits alone, or one map")
        if result in self.flat or (result in self.maps and self.maps[result] == self.network.image):
            raise ValueError(f"{name}.forward gives its input or flattened positions; it must give logits or a map")
        self.network.output = self.maps.get(result, result.name)

    def _refuse_hooks(self, node: fx.Node) -> None:
        """Hooks are code of the user's that sees whole maps; pruning and old-style weight norm put them there too."""
        target = self.target(node)
        if isinstance(target, nn.Module) and supported.has_hooks(target):
            raise self.refusal(node, "has hooks, which cannot be streamed; remove them first")

    def _refuse_hidden_leaves(self, node: fx.Node) -> None:
        """Tensors that want gradients and are no parameters: nothing would bring them any."""
        if node.op == "get_attr":
            value = self.constants[str(node.target)]
            found = {} if any(value is p for p in self.network.parameters) else {str(node.target): value}
        elif node.op == "call_module":
            module = self.target(node)
            found = {**module._buffers, **vars(module)}
        else:
            return
        for name, value in found.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise self.refusal(node, f"{name} requires grad but is no parameter; make it an nn.Parameter")

    def _refuse_outer_hooks(self) -> None:
        """What torch.fx does not see: hooks of the network itself, hooks on gradients, methods that were replaced."""
        for path, module in self.net.named_modules():
            hooks = [module._backward_hooks, module._backward_pre_hooks]
            if module is self.net:
                hooks += [module._forward_hooks, module._forward_pre_hooks]
            container = module is not self.net and not _Tracer().is_leaf_module(module, path)
            if any(hooks) or "forward" in vars(module) or (container and supported.has_hooks(module)):
                raise ValueError(
                    f"{path or '(root)'}: {type(module).__name__}: has hooks, or a forward of its own, which cannot be "
                    "streamed; remove them first"
                )

    def _prune(self) -> None:
        """Drops nodes, reductions and vectors that the result does not depend on."""
        network, wanted = self.network, {self.network.output}
        used: dict[str, tuple[str, ...]] = {n.name: (*n.inputs, *n.vectors) for n in network.nodes}
        used |= {name: (r.source,) for name, r in network.reductions.items()}
        used |= {v.name: v.inputs for v in network.vectors}
        stack = [network.output, *(v.name for v in network.vectors if v.static or v.writes)]  # shapes: asked of maps
        wanted |= set(stack)
        while stack:
            for name in used.get(stack.pop(), ()):
                if name not in wanted:
                    wanted.add(name)
                    stack.append(name)
        network.nodes = [n for n in network.nodes if n.name in wanted]
        network.reductions = {name: r for name, r in network.reductions.items() if name in wanted}
        network.vectors = [v for v in network.vectors if v.name in wanted]
        known = {network.image, *(n.name for n in network.nodes)}
        if not network.reductions and network.output not in known:
            raise ValueError(f"{type(self.net).__name__}.forward does not depend on its input")

    def _measured(self) -> Network:
        """With strides and channels: three of the image, where that is one of several answers, else the fewest."""
        network = self.network
        if not any(isinstance(n.operation, (Convolution, TransposedConvolution)) for n in network.nodes):
            raise ValueError(
                f"{type(self.net).__name__} has no convolution, so the number of input channels is not known"
            )
        strides: dict[str, Stride] = {network.image: (1, 1)}
        for node in network.nodes:
            y, x = strides[node.inputs[0]]
            step = supported.step(node.operation)
            node.stride = strides[node.name] = (supported.whole(y * step[0]), supported.whole(x * step[1]))
        unfit: list[ValueError] = []
        met: list[ValueError] = []
        for count in dict.fromkeys((3, *range(1, MOST_CHANNELS))):
            try:
                return network.of(count)
            except ValueError as error:
                (unfit if str(error).startswith("image of ") else met).append(error)
            if len(met) > 8:  # vectors do not fit, whatever the maps are
                break
        raise (met or unfit)[0]

    def seen_through(self, value: str, node: fx.Node) -> bool:
        """Whether anything after `node` reads another map that shares memory with `value`."""
        root = self.views.get(value)
        others = {name for name, shared in self.views.items() if shared == root and name != value}
        read = {n: {name} for n, name in self.maps.items()} | {n: set(names) for n, names in self.tuples.items()}
        return any(names & others and any(user > node for user in n.users) for n, names in read.items())

    def path(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        return list(stack)[-1] if stack else ""

    def refusal(self, node: fx.Node, why: str) -> ValueError:
        target = self.target(node)
        what = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", str(target))
        return ValueError(f"{self.path(node) or '(root)'}: {what}: {why}")


class _Context:
    """One fx node that reads maps, and how to put what it means into the network."""

    def __init__(self, builder: _Builder, node: fx.Node) -> None:
        self.builder, self.node = builder, node
        self.network, self.target = builder.network, builder.target(node)
        self.args, self.kwargs = node.args, node.kwargs
        self.is_module = isinstance(self.target, nn.Module)
        self.overwrites = False

    def is_map(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.builder.maps

    def is_static(self, value: Any) -> bool:
        """Whether a value, or any part of it, follows from the image's size."""
        found: list[fx.Node] = []

        def look(node: fx.Node) -> fx.Node:
            found.append(node)
            return node

        fx.map_arg(value, look)
        return bool(found) and all(n in self.builder.static for n in found)

    def is_flat(self, value: fx.Node) -> bool:
        return value in self.builder.flat

    def resolve(self, value: Any, known: Mapping[str, Any]) -> Any:
        return fx.map_arg(value, lambda n: known[n.name])

    def alias(self, source: fx.Node, flat: bool | None = None) -> None:
        """The node is the same map as `source`, seen with flat positions or not."""
        self.builder.maps[self.node] = self.builder.maps[source]
        if self.is_flat(source) if flat is None else flat:
            self.builder.flat.add(self.node)

    def shape(self, source: fx.Node, call: Callable[[Any], Any]) -> None:
        """The node is something about the shape of the map `source`."""
        value, flat = self.builder.maps[source], self.is_flat(source)

        def get(known: Mapping[str, Any]) -> Any:
            n, c, h, w = known[value]
            return call(torch.Size((n, c, h * w)) if flat else torch.Size((n, c, h, w)))

        self.builder.static.add(self.node)
        self.builder.levels[self.node.name] = 0
        self.network.vectors.append(Vector(self.node.name, get, 0, True, (value,)))

    def map(
        self, operation: Operation, inputs: tuple[Any, ...], vectors: tuple[str, ...] = (), *,
        make: Any = None, name: str | None = None, overwrites: bool = False, view: bool = False,
    ) -> str:  # fmt: skip
        """Appends a step over maps; returns the name of its result, which is the node's value unless it has a name."""
        builder, own = self.builder, name or self.node.name
        values = tuple(i if isinstance(i, str) else builder.maps[i] for i in inputs)
        level = max([builder.levels[v] for v in values] + [builder.levels[v] for v in vectors if v in builder.levels])
        if overwrites and builder.seen_through(values[0], self.node):
            raise ValueError("overwrites a map of which another value is a view; use the form that is not in place")
        if overwrites:  # who reads the input from now on, under whatever name, sees the result
            builder.maps.update({other: own for other, value in builder.maps.items() if value == values[0]})
        if view:
            builder.views[own] = builder.views.setdefault(values[0], values[0])
        builder.levels[own] = level
        self.network.linear &= not vectors
        self.network.nodes.append(
            Node(own, operation, values, builder.path(self.node), vectors, level=level, make=make)
        )
        if name is None:
            builder.maps[self.node] = own
            if any(isinstance(i, fx.Node) and self.is_flat(i) for i in inputs):
                builder.flat.add(self.node)
        return own

    def extent_vector(self, name: str, source: str) -> None:
        """Appends the number of positions of a map."""
        self.builder.levels[name] = 0

        def area(known: Mapping[str, Any]) -> int:
            return int(known[source][2] * known[source][3])

        self.network.vectors.append(Vector(name, area, 0, True, (source,)))

    def parts(self, names: list[str]) -> None:
        """The node is a tuple of these maps."""
        self.builder.tuples[self.node] = names

    def reduce(self, reduction: Reduction, name: str | None = None) -> str:
        """Appends a reduction; it is the node's value unless it has a name."""
        own = name or self.node.name
        level = self.builder.levels[reduction.source] + 1
        self.builder.levels[own], reduction.level = level, level
        self.network.linear &= reduction.kind == "mean" and level == 1
        self.network.reductions[own] = reduction
        return own

    def vector(self, name: str, call: Callable[[Mapping[str, Any]], Any], inputs: tuple[str, ...]) -> str:
        """Appends a vector computed from others."""
        level = max(self.builder.levels[i] for i in inputs)
        self.builder.levels[name] = level
        self.network.linear = False
        self.network.vectors.append(Vector(name, call, level, False, inputs))
        return name

    def constant(self, source: Any) -> Any:
        """The parameter that a node stands for; None for None."""
        if source is None:
            return None
        if source.op != "get_attr":
            raise ValueError("weights that the forward code computes cannot be streamed here")
        return self.builder.constants[str(source.target)]

    def value(self, source: fx.Node) -> str:
        return self.builder.maps[source]

    def producer(self, source: fx.Node) -> Node | None:
        return next((n for n in self.network.nodes if n.name == self.builder.maps[source]), None)
