"""Heat maps of the maps of a picture that raise the score of a class, by Grad-CAM.

The method is that of Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", arXiv:1610.02391. Captum computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import evaluation_mode, without_inplace, without_softmax
from cvdist.interpret.layers import ConvLayer, following_relu

_BATCH_SIZE = 4  # all activations of a picture are kept for the gradient: 110 MB in a VGG16


def grad_cam(model: nn.Module, layer: ConvLayer, images: Tensor, classes: Tensor) -> Tensor:
    """Compute the Grad-CAM map of one class for each picture.

    The channels of the layer's map after ReLU are weighted with the mean gradient of the class score and
    summed, and negative values become zero (equations 1 and 2 of the paper). This works for frozen layers as
    well, and the model's parameters get no gradients.

    Args:
        model: Returns scores (n, classes). A softmax or log-softmax at its end is skipped, as in the paper.
        layer: The layer whose maps are used, usually the last convolution.
        images: Normalized pictures, float (n, C, H, W), on the model's device.
        classes: The class of each picture's map, int64 (n,).

    Returns:
        The maps, float32 (n, h, w) on the CPU, 0 or more, as large as the maps of the layer.
    """
    from captum.attr import LayerGradCam

    captum = LayerGradCam(model, following_relu(model, layer))
    maps = []
    with evaluation_mode(model), without_inplace(model), without_softmax(model), torch.enable_grad():
        for batch, wanted in zip(images.split(_BATCH_SIZE), classes.split(_BATCH_SIZE), strict=True):
            # Gradients for the pixels, so that autograd records a graph even if all layers are frozen.
            pixels = batch.detach().clone().requires_grad_()
            attributed = captum.attribute(pixels, target=wanted.to(images.device), relu_attributions=True)
            maps.append(attributed.detach()[:, 0].float().cpu())
    if not maps:
        return torch.empty(0, 1, 1)
    return torch.cat(maps)
