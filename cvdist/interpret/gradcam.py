"""Which part of a picture speaks for a class: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), by Captum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import evaluating, not_in_place, without_softmax
from cvdist.interpret.layers import ConvLayer, rectified

_PORTION = 4  # pictures at a time: their activations are all kept for the gradient, 110 MB each in a VGG16


def grad_cam(model: nn.Module, layer: ConvLayer, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place speaks for a class: float32 (n, h, w) on the CPU, 0 or more, as large as the layer's
    map.

    The map is that after the layer's ReLU (see `rectified`). Its channels are weighted with the class score's
    mean gradient, summed, and only what is positive is kept (equations 1 and 2 of the paper). Frozen layers do
    as well, and the model's parameters get no gradients.

    Args:
        model: returns scores (n, classes). A (log-)softmax at its end is left out, as in the paper.
        layer: usually the last convolution.
        images: float (n, C, H, W), normalised, on the model's device.
        classes: int64 (n,), the class asked about for each picture.
    """
    from captum.attr import LayerGradCam

    captum = LayerGradCam(model, rectified(model, layer))
    parts = []
    with evaluating(model), not_in_place(model), without_softmax(model), torch.enable_grad():
        for portion, wanted in zip(images.split(_PORTION), classes.split(_PORTION), strict=True):
            # A graph also where all layers are frozen.
            pixels = portion.detach().clone().requires_grad_()
            maps = captum.attribute(pixels, target=wanted.to(images.device), relu_attributions=True)
            parts.append(maps.detach()[:, 0].float().cpu())
    if not parts:
        return torch.empty(0, 1, 1)
    return torch.cat(parts)
