"""Cuts a network in two at a point through which everything passes, whatever its architecture.

`torch.fx` records the operations of a forward pass as a graph. A *bottleneck* of the graph is an operation
whose output is all that later operations use: what comes before it and what comes after it are two networks.
Stages are found in the same graph, from the sizes of the maps.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# Pictures that a CPU runs through frozen layers at a time. The activations between two layers then mostly stay
# in its caches, and 64 photographs need 50 MB for them instead of 400.
_MICRO_BATCH = 8
# A stage begins where height and width have shrunk to this share of what they were in the stage before.
# Convolutions without padding shrink maps a little.
_SHRUNK = 0.75
_TRUNK = 0.8  # share of all parameters that the blocks of a network without stages of different sizes have
_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout)


_Compute = Callable[[nn.Module, Tensor], Tensor]


class Layers(nn.Module):
    """The layers that a graph uses, under their names in the network, and the graph's computation."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        """Share the layers of `network` that `graph` uses.

        Args:
            network: Has a module or a tensor for each name in the graph.
            graph: From images or features, float (n, ...), to one tensor.
        """
        super().__init__()
        built = fx.GraphModule(network, graph)
        # A plain function, so that copies of this module share it.
        self._compute = type(built).forward
        self._again: tuple[_Compute, ...] = ()
        self._then: _Compute | None = None
        self._modules.update(built._modules)
        self._parameters.update(built._parameters)
        self._buffers.update(built._buffers)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the graph's output."""
        if not (self._again and self.training):
            return self._compute(self, images)
        for compute in self._again:
            # Values in between are not kept. The second computation draws the same random numbers.
            images = checkpoint(
                compute,
                self,
                images,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _keep_statistics(self)),
            )
        return self._then(self, images) if self._then is not None else images

    def recompute(self, *parts: Layers, then: Layers | None = None) -> None:
        """Keep only the inputs of `parts` for the backward pass, which computes each part again.

        Args:
            parts: Layers of this module that follow each other.
            then: Layers that follow the parts, if the parts are not all of this module.
        """
        self._again = tuple(part._compute for part in parts)
        self._then = then._compute if then is not None else None


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of a batch, but not collect them a second time."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in norms]
    for layer in norms:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, values in zip(norms, before, strict=True):
            layer.momentum, layer.num_batches_tracked = values


class Frozen(Layers):
    """Layers that never change: without gradients, and always in evaluation mode."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        """Freeze the layers of `network` that `graph` uses, in place."""
        super().__init__(network, graph)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode, so that batch norms neither use nor collect the statistics of a batch."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute features, float (n, ...), from images, float (n, ...); on a CPU a few pictures at a time."""
        run = super().forward
        whole = images.device.type != "cpu" or len(images) <= _MICRO_BATCH or isinstance(images, FakeTensor)
        if whole or torch.compiler.is_compiling():
            return run(images)
        return torch.cat([run(some) for some in images.split(_MICRO_BATCH)])


class _Tracer(fx.Tracer):
    """Traces down to blocks, each of which stays one operation with its own code, and to the last layer."""

    def __init__(self, last: str) -> None:
        """Note the name of the last layer."""
        super().__init__()
        self._last = last

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the module stays one operation of the graph."""
        if type(m) is nn.Sequential and "." not in module_qualified_name:
            return False
        if self._last.startswith(f"{module_qualified_name}."):
            return False
        return 2 * len(list(m.modules())) <= len(list(self.root.modules()))


# Functions that initializers and norms call. The result has the shape of the first argument.
_SAME_SHAPE = frozenset(
    (
        *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
        *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_),
        *(Tensor.mul_, Tensor.add_, Tensor.clamp_),
        *(nn.functional.batch_norm, nn.functional.layer_norm),
    )
)


class WithoutValues(TorchFunctionMode):
    """A context in which new layers get weights on the meta device, with shapes but no values.

    Buffers are ordinary. Operations that only change values, such as initializing weights and norms, take most
    of the time on the meta device, so they are skipped.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; all layers of PyTorch allocate their weights by `torch.empty`."""
        kwargs = kwargs or {}
        if func in _SAME_SHAPE:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func is torch.empty:
            kwargs = {"device": "meta", **kwargs}
            kwargs["device"] = kwargs["device"] or "meta"
        return func(*args, **kwargs)


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes the shape of each tensor in `node.meta["shape"]`."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


@dataclass(frozen=True)
class Cuts:
    """A traced network and where it can be cut. Copies of a model share it.

    Attributes:
        graph: From images (n, 3, H, W) to scores (n, classes).
        last: Name of the last layer with weights, which has an output for each class.
        pooled: Name of the operation whose output the last layer reads, dropout aside.
        maps: Name of the operation that computes the last maps, (n, C, h, w); empty if the network has none.
        stages: For each stage but the first, the name of the operation that its input comes from.
        shapes: Shapes of the outputs of `pooled` and `maps` for one picture.
    """

    graph: fx.Graph
    last: str
    pooled: str
    maps: str
    stages: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    def begin(self, features_at: str, trainable_stages: int) -> str:
        """Return the operation whose output the trained layers read; empty if they read the pictures.

        Args:
            features_at: `pooled` or `maps`.
            trainable_stages: How many stages are trained besides the head.
        """
        ends = ("", *self.stages, self.maps if features_at == "maps" else self.pooled)
        return ends[len(ends) - 1 - trainable_stages]


def find_cuts(network: nn.Module, images: Tensor) -> Cuts:
    """Trace `network`, and find where it can be cut.

    Args:
        network: Returns scores (n, classes), and needs no values: the meta device will do.
        images: A batch that the network takes, on the same device.

    Raises:
        fx.proxy.TraceError: If the network's computation depends on values, so that it has no graph.
    """
    # Without what no output depends on, such as a check of the pictures' size.
    last_layer = [key for key, one in network.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d))][-1]
    optional = {
        key: one.default
        for key, one in inspect.signature(network.forward).parameters.items()
        if one.default is not inspect.Parameter.empty
    }
    graph = part(_Tracer(last_layer).trace(network.eval(), optional), "")
    with torch.no_grad(), WithoutValues():
        _Shapes(fx.GraphModule(network, graph)).run(images)
    modules = dict(network.named_modules())
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    layers = [node for node in nodes if node.op == "call_module" and _has_weights(modules[node.target])]
    last = layers[-1]
    segments = _segments(nodes, index, modules)
    before = [node for node, _ in segments if index[node] < index[last]]
    pooled = next(node for node in reversed(before) if not _is_dropout(node, modules))
    starts = _stages(network, [(node, own) for node, own in segments if index[node] <= index[pooled]], modules)
    maps = next(
        (
            node
            for node in reversed(before)
            if _is_map(node.meta["shape"]) and not isinstance(modules.get(str(node.target)), _POOLINGS)
        ),
        None,
    )
    # What comes before the last stage is no result of the network: a transformer has no maps.
    if maps is not None and starts and index[maps] < index[starts[-1]]:
        maps = None
    shapes = {node.name: node.meta["shape"][1:] for node in (pooled, maps) if node is not None}
    return Cuts(
        graph,
        str(last.target),
        pooled.name,
        maps.name if maps is not None else "",
        tuple(node.name for node in starts),
        shapes,
    )


def with_head(cuts: Cuts, at: str, names: tuple[str, ...]) -> fx.Graph:
    """Return the graph with other layers in place of all that follows one operation.

    Args:
        cuts: The network.
        at: Name of the operation.
        names: Names of the modules that run instead, with a `flatten` to (n, ...) before the last one.
    """
    graph, end = _copy(cuts.graph, "", at)
    for name in names[:-1]:
        end = graph.call_module(name, (end,))
    if len(names) > 1:
        end = graph.call_function(torch.flatten, (end, 1))
    graph.output(graph.call_module(names[-1], (end,)))
    return graph


def part(graph: fx.Graph, begin: str, end: str = "") -> fx.Graph:
    """Return the graph from the output of the operation `begin` to that of `end`, both by name.

    Args:
        graph: The whole graph.
        begin: Name of the operation whose output the part reads; empty: the part reads the pictures.
        end: Name of the part's last operation; empty: that of the graph.
    """
    copied, last = _copy(graph, begin, end)
    copied.output(last)
    return copied


def operation_before(graph: fx.Graph, layer: str) -> str:
    """Return the name of the operation whose output the module `layer` reads."""
    node = next(node for node in graph.nodes if node.op == "call_module" and node.target == layer)
    return str(node.all_input_nodes[0].name)


def label(graph: fx.Graph, name: str) -> str:
    """Return a name of an operation for people: its layer's, such as `features.30`, if no other runs it."""
    named = {node.name: node for node in graph.nodes}[name]
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == named.target]
    return str(named.target) if calls == [named] else name


def _copy(graph: fx.Graph, begin: str, end: str) -> tuple[fx.Graph, fx.Node]:
    nodes = list(graph.nodes)
    named = {node.name: node for node in nodes}
    first = named[begin] if begin else nodes[0]
    last = named[end] if end else nodes[-1].all_input_nodes[0]
    needed, left = {last}, [last]
    while left:
        node = left.pop()
        if node is not first:
            new = [one for one in node.all_input_nodes if one not in needed]
            needed.update(new)
            left += new
    copied = fx.Graph()
    made = {first: copied.placeholder("images" if first.op == "placeholder" else "features")}
    for node in nodes:
        if node in needed and node not in made:
            made[node] = copied.node_copy(node, made.__getitem__)
            made[node].name = node.name
    return copied, made[last]


def _segments(
    nodes: list[fx.Node], index: dict[fx.Node, int], modules: dict[str, nn.Module]
) -> list[tuple[fx.Node, list[str]]]:
    """Return all bottlenecks, each with the names of the weights that lie between it and the one before."""
    furthest, found, own = 0, [], []
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            own.append(str(node.target))
            continue
        if node.op == "call_module" and _has_weights(modules[str(node.target)]):
            own.append(str(node.target))
        if node.op not in ("placeholder", "output") and furthest <= i and "shape" in node.meta:
            found.append((node, own))
            own = []
        furthest = max([furthest, *(index[user] for user in node.users)])
    return found


def _stages(
    network: nn.Module, segments: list[tuple[fx.Node, list[str]]], modules: dict[str, nn.Module]
) -> list[fx.Node]:
    """Return the bottlenecks that the stages begin at, without the first one.

    A stage begins with the weights behind which maps are smaller. If the maps never shrink, as in a vision
    transformer, each block of the network is a stage, and so is what precedes them.
    """
    starts, size = [], 0
    for (before, _), (node, own) in zip([(None, []), *segments], segments, strict=False):
        shape = node.meta["shape"]
        now = shape[2] if len(shape) == 4 and shape[2] > 1 else 0
        if own and now and (not size or now <= _SHRUNK * size):
            if before is not None:
                starts.append(before)
            size = now
    if starts:
        return starts
    trunk = _trunk(network, modules)
    block = ""
    for (before, _), (_, own) in itertools.pairwise(segments):
        inside = [name.removeprefix(trunk).split(".")[0] for name in own if name.startswith(trunk)]
        if inside and len(inside) == len(own) and inside[0] != block:
            block = inside[0]
            starts.append(before)
    return starts


def _trunk(network: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Return the prefix of the innermost module that has most of the parameters."""
    most = _TRUNK * _size(network)
    inside = [name for name, module in modules.items() if name and _size(module) > most]
    return max(inside, key=len) + "." if inside else ""


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_dropout(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules.get(str(node.target)), nn.Dropout) or node.target is nn.functional.dropout


def _is_map(shape: tuple[int, ...]) -> bool:
    """Return whether (n, C, h, w) are maps, with their channels first. The pictures are square."""
    return len(shape) == 4 and shape[2] == shape[3] > 1
