"""Heat maps of the parts of a picture that raise the score of a class, by Grad-CAM.

The method is that of Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", arXiv:1610.02391.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import evaluation_mode, forward_hooks, without_inplace, without_softmax

_BATCH_SIZE = 4  # all activations of a picture are kept for the gradient: 110 MB in a VGG16


@dataclass(frozen=True)
class MapsLayer:
    """A layer whose output has a place for each part of the picture.

    Attributes:
        name: Name of the module.
        module: The module.
    """

    name: str
    module: nn.Module


def last_maps(model: nn.Module, image: Tensor) -> MapsLayer | None:
    """Return the last layer whose maps the model's answer rests on, found by running one picture.

    Poolings are left out. Of a vision transformer that answers from its class token, it is the
    layer in front of the last attention, because the other tokens of later layers reach no answer.

    Args:
        model: Returns scores (n, classes).
        image: One normalized picture, float (1, C, H, W), on the model's device.

    Returns:
        None if no layer has maps of more than one place.
    """
    pooled: set[int] = set()
    found: dict[int, tuple[Tensor, str]] = {}

    def note(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if as_maps(output) is None or not output.requires_grad:
            return
        if "Pool" in type(module).__name__:
            pooled.add(id(output))
        # A block and its last layer have the same output: the name is then the block's.
        found.pop(id(output), None)
        found[id(output)] = (output, name)

    hooks = [(module, functools.partial(note, name)) for name, module in model.named_modules() if name]
    with (
        evaluation_mode(model),
        without_inplace(model),
        without_softmax(model),
        torch.enable_grad(),
        forward_hooks(hooks),
    ):
        score = model(image.detach().clone().requires_grad_()).max()
        maps = [one for key, one in reversed(found.items()) if key not in pooled]
        if not maps:
            return None
        gradients = torch.autograd.grad(score, [tensor for tensor, _ in maps], allow_unused=True)
    names = [
        name
        for (_, name), gradient in zip(maps, gradients, strict=True)
        if gradient is not None and bool(as_maps(gradient).any())  # type: ignore[union-attr]
    ]
    return MapsLayer(names[0], model.get_submodule(names[0])) if names else None


def grad_cam(model: nn.Module, layer: MapsLayer, images: Tensor, classes: Tensor) -> Tensor:
    """Compute the Grad-CAM map of one class for each picture.

    The channels of the layer's maps are weighted with the mean gradient of the class score and summed, and
    negative values become zero (equations 1 and 2 of the paper). This works for frozen layers as well, and the
    model's parameters get no gradients.

    Args:
        model: Returns scores (n, classes). A softmax or log-softmax at its end is skipped, as in the paper.
        layer: The layer whose maps are used, usually `last_maps`.
        images: Normalized pictures, float (n, C, H, W), on the model's device.
        classes: The class of each picture's map, int64 (n,).

    Returns:
        The maps, float32 (n, h, w) on the CPU, 0 or more, as large as the maps of the layer.
    """
    output = images

    def keep(_module: nn.Module, _inputs: Any, result: Tensor) -> None:
        nonlocal output
        output = result

    found = []
    with (
        evaluation_mode(model),
        without_inplace(model),
        without_softmax(model),
        torch.enable_grad(),
        forward_hooks([(layer.module, keep)]),
    ):
        for batch, wanted in zip(images.split(_BATCH_SIZE), classes.split(_BATCH_SIZE), strict=True):
            # Gradients for the pixels, so that autograd records a graph even if all layers are frozen.
            scores = model(batch.detach().clone().requires_grad_())
            chosen = scores.gather(1, wanted.to(scores.device)[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, [output])
            maps, slopes = as_maps(output.detach()), as_maps(gradient)
            assert maps is not None and slopes is not None, "the layer has maps"
            found.append((slopes.mean((2, 3), keepdim=True) * maps).sum(1).relu().float().cpu())
    return torch.cat(found) if found else torch.empty(0, 1, 1)


def as_maps(output: Any) -> Tensor | None:
    """Return a layer's output as maps (n, C, h, w) of more than one place; None if it has no such form.

    Args:
        output: Maps (n, C, h, w), square ones (n, h, h, C), or tokens of a square grid (n, class + h h, C).
    """
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        return None
    if output.dim() == 4:
        _, one, two, three = output.shape
        maps = output.permute(0, 3, 1, 2) if one == two != three else output
    else:
        count = output.shape[1]
        side = math.isqrt(count)
        extra = count - side * side  # class and distillation tokens, which come first
        if extra > 2:
            return None
        maps = output[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    return maps if maps.shape[2:].numel() > 1 else None
