"""Transfer learning: a pretrained network of which the last stages or none are trained, and a trained head.

The layers have the names of the library that they come from. With the head `linear` on pooled features, the
network is the library's own with another number of classes.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from cvdist.config import BackboneConfig, ModelConfig
from cvdist.errors import UserError
from cvdist.models import heads, library, weights
from cvdist.models.cutting import Frozen, Layers, WithoutValues, label, operation_before, part, with_head
from cvdist.models.frozen import FrozenAndTrained, FrozenBackbone
from cvdist.models.registry import InputSpec, Library, ModelSpec, register_library


@dataclass(frozen=True)
class _Plan:
    """The division of a network into frozen layers, trained stages and head. Copies of a model share it.

    Attributes:
        graph: From the pictures to the scores.
        begin: Name of the operation whose output the trained layers read; empty if they read the pictures.
        head: Name of the module that is the head.
        stages: For each trained stage but the first, the name of the operation that its input comes from.
    """

    graph: fx.Graph
    begin: str
    head: str
    stages: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plan:
        """Return this same object."""
        return self


class TransferModel(Layers):
    """A network whose first stages are frozen. It takes float (n, 3, H, W) and returns scores (n, classes)."""

    def __init__(self, network: nn.Module, plan: _Plan) -> None:
        """Share the layers of `network`, and freeze those before the trained ones.

        Args:
            network: Has a module for each name in the graph.
            plan: How it is divided.
        """
        super().__init__(network, plan.graph)
        graph, begin = plan.graph, plan.begin
        # The library's own containers, so that `model.features[28]` is the same layer as in the library.
        used = {
            str(node.target).split(".")[0] for node in graph.nodes if node.op in ("call_module", "get_attr")
        }
        self._modules.update({name: child for name, child in network.named_children() if name in used})
        self.origin: weights.Origin | None = None
        self._version = network._version  # of the names in its state dict, which MNASNet looks at
        self._plan = plan
        self._frozen_names: list[str] = []
        if begin:
            frozen = part(graph, "", begin)
            Frozen(self, frozen)  # which freezes them, once and for all
            self._frozen_names = [str(node.target) for node in frozen.nodes if node.op == "call_module"]
            for node in graph.nodes:
                # They would overwrite features, which others may read again.
                if node.op == "call_module" and begin in [one.name for one in node.all_input_nodes]:
                    module = self.get_submodule(str(node.target))
                    if getattr(module, "inplace", False) is True:
                        module.inplace = False  # type: ignore[assignment]

    @property
    def head_name(self) -> str:
        """The name of the head."""
        return self._plan.head

    @property
    def last_layer(self) -> str:
        """The name of the last layer, which has an output for each class."""
        head = self.get_submodule(self.head_name)
        return f"{self.head_name}.{len(head) - 1}" if isinstance(head, nn.Sequential) else self.head_name

    def frozen_and_trained(self) -> FrozenAndTrained:
        """Return the frozen layers and the rest, both with the model's own names."""
        graph, begin, head = self._plan.graph, self._plan.begin, self._plan.head
        end = operation_before(graph, head)
        before = Layers(self, part(graph, begin, end))
        frozen = Frozen(self, part(graph, "", begin)) if begin else None
        trained = Layers(self, part(graph, begin)) if begin else self
        if next(before.parameters(), None) is None:
            return FrozenAndTrained(frozen, trained, None, head)
        cut = itertools.pairwise((begin, *self._plan.stages, end))
        stages = tuple(Layers(self, part(graph, *ends)) for ends in cut)
        return FrozenAndTrained(frozen, trained, before, head, stages, Layers(self, part(graph, end)))

    def train(self, mode: bool = True) -> TransferModel:
        """Set training mode, except for the frozen layers: their batch norms must keep their statistics."""
        super().train(mode)
        for name in self._frozen_names:
            self.get_submodule(name).eval()
        return self


def _new(name: str, input: InputSpec, num_classes: int, settings: ModelConfig) -> TransferModel:
    """Build the model with random weights: the library's in front of the head, PyTorch's in the head."""
    cuts, at = library.cuts(name), _cut(name, settings)
    network = library.create(name, num_classes, input.height)
    graph, head = cuts.graph, cuts.last
    if at == "maps" or settings.head != "linear":  # else the network's own last layer is the head
        read = cuts.maps if at == "maps" else cuts.pooled
        pooling, classifier = heads.build(settings.head_size, settings.dropout, num_classes, cuts.shapes[read])
        if len(cuts.shapes[read]) > 1:
            head, network.avgpool = "classifier", pooling
            graph = with_head(cuts, read, ("avgpool", head))
        else:
            graph = with_head(cuts, read, (head,))
        network.set_submodule(head, classifier)
        if not settings.has_weights and settings.head == "vgg":
            heads.init_like_torchvision(classifier)
    trained = settings.trained_of(len(cuts.stages) + 1)
    stages = cuts.stages[len(cuts.stages) + 1 - trained :] if trained else ()
    return TransferModel(network, _Plan(graph, cuts.begin(at, trained), head, stages))


def _cut(name: str, settings: BackboneConfig) -> str:
    """Return what the head reads, `pooled` or `maps`.

    Raises:
        UserError: If the network has no maps, or not as many stages.
    """
    cuts = library.cuts(name)
    if settings.cut == "maps" and not cuts.maps:
        raise UserError(
            f"--model {name} has no maps of convolutions at its end: use --features-at pooled, "
            "and --head linear or mlp"
        )
    stages = len(cuts.stages) + 1
    if settings.trained_of(stages) > stages:
        raise UserError(
            f"--trainable-stages is {settings.trainable_stages}: --model {name} has {stages}, of which the "
            f"last begins after {label(cuts.graph, cuts.stages[-1])}"
        )
    return settings.cut


def _build(name: str, input: InputSpec, num_classes: int, settings: ModelConfig) -> TransferModel:
    """Build the model. Layers that the pretrained weights contain get their values, all others are random.

    The last layer is always random. All layers of a head of ours are random if the weights have no such head.

    With pretrained weights, random layers are initialized by PyTorch's default, with a variance of 1 / (3
    inputs), and not as in torchvision's VGG, with 0.01^2. On the convolutions of IMAGENET1K_FEATURES, whose
    activations have a root mean square of 12, the latter has nearly three times the training loss in the first
    epoch (`docs/results.md`).
    """
    if not settings.has_weights:
        return _new(name, input, num_classes, settings)
    with WithoutValues():
        model = _new(name, input, num_classes, settings)
    pretrained = weights.load(settings, model)
    # `load` has compared names and shapes; what is absent now gets random values below.
    copied = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in pretrained.state.items()
    }
    model.load_state_dict(copied, strict=False, assign=True)
    give_values(model.get_submodule(model.head_name))
    model.origin = pretrained.origin
    return model


def give_values(module: nn.Module) -> None:
    """Initialize the layers of `module` without values by PyTorch's random default, on the default device."""
    for layer in module.modules():
        if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
            layer.to_empty(device=torch.get_default_device(), recurse=False)
            layer.reset_parameters()  # type: ignore[operator]


def _build_frozen(name: str, side: int, settings: ModelConfig) -> FrozenBackbone | None:
    """Build only the frozen layers, mapped from the file of weights, without memory for the rest."""
    if not settings.has_weights:
        return None
    with WithoutValues():
        model = _new(name, InputSpec(3, side, side), 1000, settings)
    frozen = model.frozen_and_trained().frozen
    if not isinstance(frozen, Frozen):
        return None
    pretrained = weights.load(settings, model)
    frozen.load_state_dict(
        {key: value for key, value in pretrained.state.items() if key in frozen.state_dict()},
        strict=False,  # files older than PyTorch 0.4.1 have no counters of batches, and nothing reads them
        assign=True,
    )
    frozen.requires_grad_(False)
    cuts = library.cuts(name)
    cut = cuts.begin(settings.cut, settings.trained_of(len(cuts.stages) + 1))
    return FrozenBackbone(frozen, label(cuts.graph, cut), pretrained.origin.source)


@functools.cache
def _describe(name: str) -> ModelSpec | None:
    if name.startswith(library.TIMM):
        library.require(name)
    elif name not in library.names():
        return None
    side = library.default_side(name)
    return ModelSpec(
        name=name,
        default_input=InputSpec(channels=3, height=side, width=side),
        problem=lambda input: library.problem(name, input.height, input.width),
        build=functools.partial(_build, name),
        any_channels=False,
        stages=lambda: len(library.cuts(name).stages) + 1,
        build_frozen=functools.partial(_build_frozen, name),
    )


register_library(Library(library.names, _describe))
