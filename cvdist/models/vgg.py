"""VGG with pretrained convolutions, of which the last blocks or none are trained: the book's transfer learning.

The layers are torchvision's, so that a state dict fits an ordinary `torchvision.models.vgg16`. Architecture:
Simonyan and Zisserman 2014, arXiv:1409.1556; with batch norms the names end in `_bn`.
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

    Takes float (n, 3, H, W) with sides of `SMALLEST_SIDE` or more, returns scores (n, classes). For 224x224
    pictures `features` gives (n, 512, 7, 7); for other sizes `avgpool` brings them to that.
    """

    features: nn.Sequential
    avgpool: nn.Module
    flatten: nn.Module
    classifier: nn.Sequential

    def __init__(self, vgg: torchvision.models.VGG, trainable_blocks: int) -> None:
        """Take over the layers of `vgg`, and freeze all of its convolutions but the last `trainable_blocks`."""
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
        """As usual, but the frozen layers stay in evaluation mode, which batch norms need."""
        super().train(mode)
        self.features[: self._frozen_layers].eval()
        return self

    def _frozen(self) -> Frozen:
        return Frozen(OrderedDict(features=self.features[: self._frozen_layers]))


def _build(name: str, input: InputSpec, num_classes: int, settings: ModelConfig) -> TransferVGG:
    """The model for `num_classes`: what the weights have comes from them, all else is new.

    The last layer is always new, and with weights of the convolutions alone all linear layers are, as they are
    where the weights' head is another one than that of `settings`. Those begin
    as PyTorch's linear layers do, with a variance of 1 / (3 inputs), not as a new VGG of torchvision does, with
    0.01^2. On the convolutions of IMAGENET1K_FEATURES, whose activations have a root mean square of 12, the
    latter has nearly three times the training loss in its first epoch (`docs/results.md`).
    """
    with torch.device("meta"):  # its classifier, nine tenths of a VGG16, may not be the one that is wanted
        vgg = torchvision.models.get_model(name, weights=None)
    vgg.features.to_empty(device=torch.get_default_device())
    _begin(vgg.features)
    vgg.avgpool, vgg.classifier = heads.build(settings, num_classes)
    if not settings.has_weights:
        heads.begin_as_torchvision(vgg.classifier)
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
    """The frozen convolutions alone; the classifier, nine tenths of a VGG16, is not even made."""
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
