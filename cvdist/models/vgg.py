"""Transfer learning with VGG: pretrained convolutions, of which only the last blocks or none are trained.

The layers have torchvision's names, so a state dict fits an ordinary `torchvision.models.vgg16`. Architecture:
Simonyan and Zisserman 2014, arXiv:1409.1556. Names of variants with batch normalization end in `_bn`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torchvision
from torch import nn

from cvdist.config import ModelConfig
from cvdist.models import heads, weights
from cvdist.models.frozen import Frozen, FrozenAndTrained, FrozenBackbone
from cvdist.models.registry import BLOCKS, InputSpec, ModelSpec, register

# Each block of convolutions ends with a max pooling that halves height and width.
SMALLEST_SIDE = 2**BLOCKS


class TransferVGG(nn.Sequential):
    """A VGG whose first convolution blocks are frozen.

    It takes float (n, 3, H, W) with sides of `SMALLEST_SIDE` or more, and returns scores (n, classes). For
    224x224 pictures the output of `features` is (n, 512, 7, 7); for other sizes `avgpool` converts to the size
    that the classifier needs.
    """

    features: nn.Sequential
    avgpool: nn.Module
    flatten: nn.Module
    classifier: nn.Sequential

    def __init__(self, vgg: torchvision.models.VGG, trainable_blocks: int) -> None:
        """Take over the layers of `vgg`, and freeze all blocks of convolutions but the last ones.

        Args:
            vgg: torchvision's model.
            trainable_blocks: number of last blocks that stay trainable.
        """
        super().__init__(
            OrderedDict(
                features=vgg.features, avgpool=vgg.avgpool, flatten=nn.Flatten(), classifier=vgg.classifier
            )
        )
        self.origin: weights.Origin | None = None
        ends = [i for i, layer in enumerate(vgg.features, start=1) if isinstance(layer, nn.MaxPool2d)]
        self._frozen_layers = [0, *ends][BLOCKS - trainable_blocks]
        self._frozen()  # which freezes them, once and for all

    def frozen_and_trained(self) -> FrozenAndTrained:
        """Return the frozen blocks and the rest, both with the layers' own numbers as names."""
        if not self._frozen_layers:
            return FrozenAndTrained(frozen=None, trained=self, backbone=self.features)
        blocks = self.features[self._frozen_layers :]
        head = OrderedDict(avgpool=self.avgpool, flatten=self.flatten, classifier=self.classifier)
        if not len(blocks):
            return FrozenAndTrained(self._frozen(), nn.Sequential(head))
        return FrozenAndTrained(
            self._frozen(), nn.Sequential(OrderedDict(features=blocks, **head)), backbone=blocks
        )

    def train(self, mode: bool = True) -> TransferVGG:
        """Set training mode, except for the frozen layers: their batch norms must keep their statistics."""
        super().train(mode)
        self.features[: self._frozen_layers].eval()
        return self

    def _frozen(self) -> Frozen:
        return Frozen(OrderedDict(features=self.features[: self._frozen_layers]))


def _build(name: str, input: InputSpec, num_classes: int, settings: ModelConfig) -> TransferVGG:
    """Build the model. Layers that the pretrained weights contain get their values, all others are random.

    The last layer is always random. All linear layers are random if the weights have no classifier, or one of
    another head than that of `settings`.

    With pretrained weights, random linear layers are initialized by PyTorch's default, with a variance of
    1 / (3 inputs), and not as in torchvision's VGG, with 0.01^2. On the convolutions of IMAGENET1K_FEATURES,
    whose activations have a root mean square of 12, the latter has nearly three times the training loss in the
    first epoch (`docs/results.md`).
    """
    with torch.device("meta"):  # its classifier, nine tenths of a VGG16, may not be the one that is wanted
        vgg = torchvision.models.get_model(name, weights=None)
    vgg.features.to_empty(device=torch.get_default_device())
    _begin(vgg.features)
    vgg.avgpool, vgg.classifier = heads.build(settings, num_classes)
    if not settings.has_weights:
        heads.init_like_torchvision(vgg.classifier)
    model = TransferVGG(vgg, settings.trainable_blocks)
    if settings.has_weights:
        pretrained = weights.load(settings, model.state_dict())
        # `load` has compared names and shapes; what is absent now keeps its random values.
        model.load_state_dict(pretrained.state, strict=False)
        model.origin = pretrained.origin
    return model


def _begin(features: nn.Module) -> None:
    """Random weights as a new VGG of torchvision has them (He et al. 2015, arXiv:1502.01852)."""
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()


def _build_frozen(name: str, settings: ModelConfig) -> FrozenBackbone | None:
    """Build only the frozen convolutions, without the memory for the classifier, nine tenths of a VGG16."""
    if not settings.has_weights:
        return None
    with torch.device("meta"):  # shapes without values
        vgg = torchvision.models.get_model(name, weights=None)
        vgg.avgpool, vgg.classifier = heads.build(settings, num_classes=1000)
        model = TransferVGG(vgg, settings.trainable_blocks)
    frozen = model.frozen_and_trained().frozen
    if not isinstance(frozen, Frozen):
        return None
    pretrained = weights.load(settings, model.state_dict())
    for key, tensor in frozen.state_dict().items():
        # Files older than PyTorch 0.4.1 have no counters of batches, and nothing reads them.
        value = pretrained.state.get(key, torch.zeros(tensor.shape, dtype=tensor.dtype))
        frozen.load_state_dict({key: value}, strict=False, assign=True)
    frozen.requires_grad_(False)
    last = len(list(frozen.get_submodule("features").children())) - 1
    return FrozenBackbone(frozen, f"features.{last}", pretrained.origin.source)


def _spec(name: str, layers: int) -> ModelSpec:
    norms = " with batch norms" if name.endswith("_bn") else ""
    return ModelSpec(
        name=name,
        summary=f"VGG of {layers} layers{norms}: pretrained convolutions (--weights), a new last layer",
        default_input=InputSpec(channels=3, height=224, width=224),
        smallest_side=SMALLEST_SIDE,
        build=lambda input, num_classes, settings: _build(name, input, num_classes, settings),
        any_channels=False,
        pretrained=True,
        build_frozen=lambda settings: _build_frozen(name, settings),
    )


for layers in (11, 13, 16, 19):
    for suffix in ("", "_bn"):
        register(_spec(f"vgg{layers}{suffix}", layers))
