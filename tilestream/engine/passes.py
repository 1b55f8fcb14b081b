"""Passes over one image, segment by segment and tile by tile: forward, and backward by scatter or by gather.

Scatter: a tile owns outputs; it runs its segment again (or for the first time), goes back at once, and adds what its
window's inputs get to what others add, in the order of the tiles. Gather: the forward pass puts on a stored tape what
the way back needs (a bit for each ReLU, the winners of pooling); then a tile owns inputs, and reads the gradients of
all outputs that those influence. Nothing is computed twice, nothing added up, and rules that clamp gradients are exact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tilestream.geometry import Region

from .allocator import trim
from .operations import Rule, fitted
from .reductions import Partial, refuse_nan
from .scratch import Bits, Scratch, Stored
from .segment import Segment, winners
from .tile import Gradients, Source, backward, forward, keeps, read
from .trace import Network, Node

Mode = Literal["scatter", "gather"]
Write = Callable[[Region, Tensor], None]
"""Takes a finished part of a map and its values, (C, h, w)."""
Sizes = tuple[tuple[int, int], tuple[int, int]]
"""Tiles of a segment in image px, forward and backward."""


class Pass:
    """One image on its way through a bound network. `tape`: the forward pass stores what gather needs."""

    def __init__(
        self, network: Network, cut: list[tuple[Segment, Sizes]], source: Source, scratch: Scratch, *,
        tape: bool = False, tick: Callable[[], None] = lambda: None, limit_bytes: int = sys.maxsize,
    ) -> None:  # fmt: skip
        self.network, self.cut, self.source, self.scratch, self.tape = network, cut, source, scratch, tape
        self.tick, self.limit_bytes = tick, limit_bytes
        self.maps: dict[str, Stored] = {}
        self.gradients: dict[str, Stored] = {}
        self.tapes: dict[str, list[Any]] = {}
        self.totals: dict[str, Partial] = {}
        self.env: dict[str, Any] = {}
        """Reductions and vectors, with the graph that connects them; `leaves` are the reduced values."""
        self.leaves: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}
        """Vectors as the maps get them: cut off from the graph."""
        self.weights: dict[str, list[Tensor]] = {}
        self.at_vectors: dict[str, Tensor] = {}
        """The gradients that arrived at vectors, from maps that read them and from the loss."""
        self._image_once = sum(network.image in segment.inputs for segment, _ in cut) == 1
        self.used = False
        self.gone_back = 0
        """Tiles that scatter went back over."""
        self._result: Tensor | None = None
        self._read_again = {r.source for r in network.reductions.values() if r.reads_map and tape}

    def close(self) -> None:
        """Frees all maps that are still stored."""
        stores = [*self.maps.values(), *self.gradients.values(), *(s for t in self.tapes.values() for s in t)]
        for stored in stores:
            stored.free()
        self.weights.clear()

    # ---- forward

    def forward(self, write: Write | None = None, *, last: bool = True) -> None:
        """Runs all segments, or all but the last; a dense result goes to `write` part by part."""
        with torch.no_grad():
            self._vectors(0)
            for segment, sizes in self.cut if last else self.cut[:-1]:
                trim()
                shares = [self._forward_tile(segment, owned, write) for owned in segment.tiles(segment.owned, sizes[0])]
                self.finish(segment, shares)
                if self.tape:  # nothing is computed again, so no map is read again
                    self._drop_read(segment)

    def _drop_read(self, segment: Segment) -> None:
        later = {name for s, _ in self.cut if s.start >= segment.stop for name in s.inputs}
        for name in set(self.maps) - later - self._read_again - set(segment.stored):
            self.maps.pop(name).free()

    def _forward_tile(self, segment: Segment, owned: dict[str, Region], write: Write | None) -> dict[str, Partial]:
        network, regions = self.network, segment.forward_regions(owned)
        values = self._inputs(segment, regions)
        save = self._saver(segment, owned, regions) if self.tape else None
        made = forward(network, segment.nodes, regions, values, self.steps, owned, save, limit_bytes=self.limit_bytes)
        parts = {name: made[name][(..., *owned[name].within(regions[name]))] for name in owned}
        self._keep(segment, owned, parts, write)
        self.tick()
        return self.shares(segment, owned, parts)

    def _keep(
        self, segment: Segment, owned: Mapping[str, Region], parts: Mapping[str, Tensor], write: Write | None
    ) -> None:
        for name, values in parts.items():
            if name in segment.stored or name in self._read_again:
                self._store(self.maps, name).write(owned[name], values)
            if name == self.network.output:
                refuse_nan(name, values, owned[name])
                if write is not None:
                    write(owned[name], values[0].to(self.network.dtype))

    def shares(self, segment: Segment, owned: Mapping[str, Region], parts: Mapping[str, Tensor]) -> dict[str, Partial]:
        network = self.network
        found = {}
        for name in segment.reduced:
            reduction = network.reductions[name]
            if reduction.source in parts:
                region, extent = owned[reduction.source], network.extents[reduction.source]
                found[name] = reduction.share(parts[reduction.source].to(network.dtype), region, extent)
        return found

    def finish(self, segment: Segment, shares: list[dict[str, Partial]]) -> None:
        """Combines the tiles' shares of the segment's reductions and computes the vectors that waited for them."""
        network = self.network
        for name in segment.reduced:
            reduction = network.reductions[name]
            total = reduction.combine([s[name] for s in shares if name in s], network.extents[reduction.source])
            self.totals[name] = total
        self.vectors_from_totals()

    def vectors_from_totals(self) -> None:
        """Computes all vectors whose reductions are known."""
        network = self.network
        for name in self.totals.keys() - self.leaves.keys():
            reduction = network.reductions[name]
            leaf = reduction.tensor(self.totals[name], network.dtype, network.device).requires_grad_()
            self.leaves[name] = leaf
            with torch.enable_grad():
                self.env[name] = reduction.shaped(leaf.clone())  # a clone, for a head may write on it
        for level in range(network.levels()):
            if all(name in self.totals for name, r in network.reductions.items() if r.level <= level):
                self._vectors(level)

    def _vectors(self, level: int) -> None:
        with torch.enable_grad():
            fresh = [v for v in self.network.vectors if v.level == level and v.name not in self.env]
            for vector in fresh:
                self.env[vector.name] = vector.call(self.env)
        for name, value in self.env.items():
            if name not in self.steps:
                self.steps[name] = value.detach() if isinstance(value, Tensor) else value

    def _value(self, name: str, region: Region) -> Tensor:
        """The image or a stored map over a region."""
        return read(self.network, self.source, region) if name == self.network.image else self.maps[name].read(region)

    def _store(self, stores: dict[str, Stored], name: str) -> Stored:
        if name not in stores:
            network = self.network
            stores[name] = self.scratch.map(
                network.channels_of()[name], network.extents[name], network.map_dtype, network.device
            )
        return stores[name]

    def _inputs(self, segment: Segment, regions: Mapping[str, Region]) -> dict[str, Tensor]:
        return {name: self._value(name, regions[name]) for name in segment.inputs if name in regions}

    # ---- the stored tape

    def _saver(self, segment: Segment, owned: Mapping[str, Region], regions: Mapping[str, Region]) -> Any:
        """Stores of each node's tape the part that is this tile's alone."""
        network, channels = self.network, self.network.channels_of()

        def save(node: Node, kind: str, saved: Any) -> None:
            if kind == "nothing":
                return
            if node.name not in self.tapes:
                self.tapes[node.name] = [
                    Bits(self.scratch, node.channels, network.extents[node.name], network.device) if kind == "sign"
                    else self.scratch.map(
                        node.channels if kind == "winners" else channels[name],
                        network.extents[node.name if kind == "winners" else name],
                        torch.int16 if kind == "winners" else network.map_dtype, network.device,
                    )
                    for name in (node.inputs if kind == "input" else (node.name,))
                ]  # fmt: skip
            values = saved if kind == "input" else [saved]
            keys = node.inputs if kind == "input" else (node.name,)
            for stored, value, key in zip(self.tapes[node.name], values, keys, strict=True):
                have = regions[key] if kind != "input" else node.operation.need(
                    regions[node.name], network.extents[key]
                )  # fmt: skip
                stored.write(have, value)  # a halo's values come out the same wherever they are computed

        return save

    def _load(self, node: Node, region: Region, want_weights: bool) -> Any:
        kind = keeps(node.operation, want_weights)
        if kind == "nothing":
            return None
        if kind == "input":
            needs = [node.operation.need(region, self.network.extents[name]) for name in node.inputs]
            return [s.read(r) for s, r in zip(self.tapes[node.name], needs, strict=True)]
        return self.tapes[node.name][0].read(region)

    # ---- there and back

    def result(self) -> Tensor:
        """The logits (1, num_classes) or the map (1, C, h, w), detached, once; runs the forward sweeps if need be."""
        network = self.network
        if self._result is None and network.dense:
            channels = network.channels_of()[network.output]
            whole = torch.empty((1, channels, *network.extents[network.output]), dtype=network.dtype)

            def write(region: Region, values: Tensor) -> None:
                whole[0, :, region.y0 : region.y1, region.x0 : region.x1] = values

            self.forward(write)
            return whole.to(network.device)
        if self._result is None:
            self.forward()
            return self.steps[network.output].clone()
        result, self._result = self._result, None
        return result

    def back(self, upstream: Tensor, write: Write | None) -> None:
        """From the gradient of `result()` to the weights, and to the image where `write` takes it."""
        self.used = True
        if self.network.dense:
            self.backward(
                None, mode="scatter", want_weights=True, write=write,
                dense=lambda region: upstream[..., region.y0 : region.y1, region.x0 : region.x1],
            )  # fmt: skip
        else:
            self.backward(upstream, mode="scatter", want_weights=True, write=write)

    def back_tiles(self) -> int:
        """Tiles of all backward sweeps by scatter."""
        return sum(len(segment.tiles(segment.owned, sizes[1])) for segment, sizes in self.cut)

    def classes(self) -> int:
        """How many logits there are, before anything ran: the head on zeros."""
        probe = Pass(self.network, [], self.source, Scratch(0))
        probe.totals.update({n: Partial(np.zeros(r.size()[1:])) for n, r in self.network.reductions.items()})
        probe.vectors_from_totals()
        return probe.steps[self.network.output].shape[1]

    def there_and_back(
        self, upstream: Callable[[], Tensor], *, mode: Mode, rule: Rule = "gradient", want_weights: bool = False,
        write: Write | None = None, mean: bool = False,
    ) -> Tensor:  # fmt: skip
        """Forward and backward, in one sweep over the last segment where the head is linear. Returns the logits."""
        if mode == "gather" or not self.network.linear:
            self.forward()
            down = upstream()
            self.backward(down, mode=mode, rule=rule, want_weights=want_weights, write=write, mean=mean)
            return self.steps[self.network.output]
        self.forward(last=False)
        probe = Pass(self.network, [], self.source, Scratch(0))
        probe.totals.update({n: Partial(np.zeros(r.size()[1:])) for n, r in self.network.reductions.items()})
        probe.vectors_from_totals()
        self.steps.update({self.network.output: probe.steps[self.network.output]})
        down = upstream()
        del self.steps[self.network.output]
        grads = probe.gradients_at_reductions(down)
        segment, sizes = self.cut[-1]
        options: dict[str, Any] = {
            "rule": rule, "want_weights": want_weights, "want_image": write is not None, "mean": mean,
            "limit_bytes": self.limit_bytes,
        }  # fmt: skip
        shares = [
            self.scatter_tile(segment, owned, grads, None, {}, write, options)
            for owned in segment.tiles(segment.owned, sizes[0])
        ]
        with torch.no_grad():
            self.finish(segment, shares)
        self._drop(segment)
        self.backward(None, mode=mode, rule=rule, want_weights=want_weights, write=write, mean=mean,
                      cut=self.cut[:-1], grads=grads)  # fmt: skip
        self._result = self.steps[self.network.output].clone()
        return self._result

    def scale(self, upstream: Tensor) -> None:
        """After `there_and_back` from a gradient of (-1, 1) or 1: what it would have been from a multiple of it."""
        for tensors in self.weights.values():
            for t in tensors:
                t *= upstream[0, -1]
        self.at_vectors.clear()
        self.gradients_at_reductions(upstream)

    # ---- backward

    def gradient_of_logit(self, target: int) -> dict[str, Tensor]:
        """d logit[target] at every reduction, by name."""
        return self.gradients_at_reductions(self.one_hot(target))

    def one_hot(self, target: int) -> Tensor:
        classes = self.steps[self.network.output].shape[1]
        if not 0 <= target < classes:
            raise ValueError(f"target={target} must be in [0, {classes}): the network has that many classes")
        hot = torch.zeros((1, classes), dtype=self.network.dtype, device=self.network.device)
        hot[0, target] = 1
        return hot

    def gradients_at_reductions(self, upstream: Tensor) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = {}
        self._to_leaves({self.network.output: upstream}, grads)
        return grads

    def upstream(
        self, segment: Segment, owned: Mapping[str, Region], regions: Mapping[str, Region],
        grads: Mapping[str, Tensor], made: Mapping[str, Tensor], dense: Callable[[Region], Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """For scatter: what reaches the values that a tile owns, zero in the rest of the regions that they cover."""
        parts = {name: made[name][(..., *owned[name].within(regions[name]))] for name in owned}
        down = self._upstream(segment, owned, grads, dense, lambda name, region: parts[name])
        return {name: fitted(value, owned[name], regions[name]) for name, value in down.items()}

    def backward(
        self, upstream: Tensor | None, *, mode: Mode, rule: Rule = "gradient", want_weights: bool = False,
        write: Write | None = None, mean: bool = False, dense: Callable[[Region], Tensor] | None = None,
        cut: list[tuple[Segment, Sizes]] | None = None, grads: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """From the gradient of the logits, or of a dense result (`dense` gives its parts), back to image and weights.

        `write` gets every part of the image's gradient once. Gradients of weights add up in `weights`, by node.
        """
        grads = dict(grads or {}) if upstream is None else self.gradients_at_reductions(upstream)
        for segment, sizes in reversed(self.cut if cut is None else cut):
            trim()
            vectors: dict[str, Tensor] = {}
            options: dict[str, Any] = {
                "rule": rule,
                "want_weights": want_weights,
                "want_image": write is not None,
                "mean": mean,
            }
            options["limit_bytes"] = self.limit_bytes
            if mode == "gather":
                for parts in segment.tiles(segment.inputs, sizes[1]):
                    self._gather_tile(segment, parts, grads, dense, vectors, write, options)
            else:
                ties = any(self.network.reductions[name].kind == "amax" for name in segment.reduced)
                tiles = segment.tiles(segment.owned, sizes[0 if ties else 1])  # tied bits are equal in equal tiles
                if winners(self.network) is not None:  # one tile at least, for gradients of zero are wanted too
                    tiles = [owned for owned in tiles if self._reached(segment, owned, grads)] or tiles[:1]
                for owned in tiles:
                    self.scatter_tile(segment, owned, grads, dense, vectors, write, options)
            if vectors:
                self._to_leaves(vectors, grads)
            self._drop(segment)
        if write is not None and not (mode == "gather" and self._image_once):
            self._write_image(write)

    def _to_leaves(self, vectors: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        """Gradients of vectors go back through their graph, to reductions and to parameters."""
        found = [(self.env[name], g) for name, g in vectors.items() if getattr(self.env[name], "requires_grad", False)]
        self.at_vectors.update(vectors)
        leaves = list(self.leaves.items())
        if not found or not leaves:  # vectors of parameters alone
            return
        got = torch.autograd.grad(
            [v for v, _ in found], [leaf for _, leaf in leaves], [g.reshape(v.shape).to(v) for v, g in found],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for (name, _), g in zip(leaves, got, strict=True):
            if g is not None:
                grads[name] = grads[name] + g if name in grads else g

    def _upstream(
        self, segment: Segment, regions: Mapping[str, Region], grads: Mapping[str, Tensor],
        dense: Callable[[Region], Tensor] | None, values: Callable[[str, Region], Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """What reaches the segment's values from later segments, reductions and the result, over `regions`."""
        network, found = self.network, dict[str, Tensor]()

        def add(name: str, share: Tensor) -> None:
            share = share.to(network.map_dtype)
            found[name] = found[name] + share if name in found else share

        for name in segment.stored:
            if name in regions and name in self.gradients:
                add(name, self.gradients[name].read(regions[name]))
        for name in segment.reduced:
            reduction = network.reductions[name]
            if reduction.source in regions and name in grads:
                region, extent = regions[reduction.source], network.extents[reduction.source]
                x = values(reduction.source, region).to(network.dtype) if reduction.reads_map else None
                add(reduction.source, reduction.backward(grads[name], self.totals.get(name), x, region, extent))
        if dense is not None and network.output in regions and network.output in segment.owned:
            add(network.output, dense(regions[network.output]))
        return found

    def _reached(self, segment: Segment, owned: Mapping[str, Region], grads: Mapping[str, Tensor]) -> bool:
        """Whether any gradient reaches what a tile owns: it holds a maximum, or lies within reach of one."""
        down = self._upstream(segment, owned, grads, None, self._value)
        return any(bool(share.any()) for share in down.values())

    def _gather_tile(
        self, segment: Segment, parts: dict[str, Region], grads: Mapping[str, Tensor], dense: Any,
        vectors: dict[str, Tensor], write: Write | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        network, regions, shared = self.network, segment.gather_regions(parts), self._shared(segment)
        upstream = self._upstream(segment, regions, grads, dense, self._value)

        def load(node: Node) -> Any:
            return self._load(node, regions[node.name], False)

        got = backward(network, segment.nodes, regions, upstream, load, self.steps, **options)
        self._vectors_of(got, vectors)
        for name, region in parts.items():
            value = got.values.get(name)
            if name == network.image and self._image_once:
                if write is not None:
                    channels = 1 if options["mean"] else network.channels
                    zeros = torch.zeros((channels, *region.shape), dtype=network.dtype)
                    write(region, zeros if value is None else value[0].to(network.dtype))
            elif value is not None:
                stored = self._input_gradient(name, options["mean"])
                (stored.add if name in shared else stored.write)(region, value)
        self.tick()

    def _shared(self, segment: Segment) -> set[str]:
        """Inputs that later segments read too, and have given their gradient already."""
        later = [s for s, _ in self.cut if s.start >= segment.stop]
        return {name for s in later for name in s.inputs}

    def scatter_tile(
        self, segment: Segment, owned: dict[str, Region], grads: Mapping[str, Tensor], dense: Any,
        vectors: dict[str, Tensor], write: Write | None, options: dict[str, Any],
    ) -> dict[str, Partial]:  # fmt: skip
        """Forward and backward over one tile; returns its shares of reductions, for a sweep that does both at once."""
        self.gone_back += 1
        network, regions, tape = self.network, segment.forward_regions(owned), dict[str, Any]()

        def save(node: Node, kind: str, saved: Any) -> None:
            tape[node.name] = saved > 0 if kind == "sign" else saved

        values = self._inputs(segment, regions)
        with torch.no_grad():
            made = forward(
                network, segment.nodes, regions, values, self.steps, owned, save, options["want_weights"],
                self.limit_bytes,
            )  # fmt: skip
            parts = {name: made[name][(..., *owned[name].within(regions[name]))] for name in owned}
            shares = self.shares(segment, owned, parts)
            upstream = self.upstream(segment, owned, regions, grads, made, dense)
            del made, parts, values
            got = backward(
                network, segment.nodes, regions, upstream, lambda node: tape.pop(node.name), self.steps, **options
            )
        self._vectors_of(got, vectors)
        for name, tensors in got.weights.items():
            if name in self.weights:
                for total, share in zip(self.weights[name], tensors, strict=True):
                    total += share
            else:
                self.weights[name] = [t.clone() for t in tensors]  # they may share memory with gradients of maps
        for name in segment.inputs:
            value = got.values.get(name)
            if value is not None and (name != network.image or write is not None):
                self._input_gradient(name, options["mean"]).add(regions[name], value)
        self.tick()
        return shares

    def _input_gradient(self, name: str, mean: bool) -> Stored:
        network = self.network
        if name == network.image and name not in self.gradients:
            self.gradients[name] = self.scratch.map(
                1 if mean else network.channels, network.extents[name], network.map_dtype, network.device
            )
        return self._store(self.gradients, name)

    def _vectors_of(self, got: Gradients, vectors: dict[str, Tensor]) -> None:
        for name, gradient in got.vectors.items():
            vectors[name] = vectors[name] + gradient if name in vectors else gradient

    def _write_image(self, write: Write) -> None:
        network = self.network
        height, width = network.extents[network.image]
        rows = max(1, min(height, 2**22 // width))
        for y in range(0, height, rows):
            region = Region(y, min(y + rows, height), 0, width)
            stored = self.gradients.get(network.image)
            if stored is not None:
                write(region, stored.read(region)[0].to(network.dtype))
            else:
                write(region, torch.zeros((1, *region.shape), dtype=network.dtype))

    def _drop(self, segment: Segment) -> None:
        """Frees what no earlier segment needs."""
        made = {n.name for n in segment.nodes}
        for name in made:
            for stores in (self.gradients, self.maps):
                if name in stores:
                    stores.pop(name).free()
            for stored in self.tapes.pop(name, ()):
                stored.free()
