"""All 13 convolutions of VGG16 with 8 photographs: maps captured by hooks against bare forward passes; drawing.

Maps are captured before and after ReLU and copied to the CPU's memory, 870 MB in total. Weights are random;
pictures have 224x224 pixels, in float32 and channels_last.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator

import torch
import torchvision

from benchmarks.harness import Comparison, compare
from cvdist.figures import style
from cvdist.figures.activations import feature_maps
from cvdist.figures.filters import filter_grid
from cvdist.interpret.activations import capture_activations, strongest_channels
from cvdist.interpret.layers import ConvLayer, convolutions

PICTURES, PAIRS, CHANNELS = 8, 3, 64


def measure() -> Iterator[Comparison]:
    """Measure the seconds for all pictures."""
    model = torchvision.models.vgg16().eval().to(memory_format=torch.channels_last)
    layers = convolutions(model)
    images = torch.randn(PICTURES, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def bare() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model(images)
        return time.perf_counter() - started

    def captured() -> float:
        started = time.perf_counter()
        capture_activations(model, images, layers)
        return time.perf_counter() - started

    yield compare(
        f"visualizing: {len(layers)} layers captured / bare forward",
        captured,
        bare,
        unit="s",
        target=3,
        pairs=PAIRS,
        at_most=True,
    )
    draw = _draw_all(model, images, layers)
    print(
        f"  drawing filters and {CHANNELS} maps before and after ReLU takes {draw():.2f} s a layer and picture"
    )


def _draw_all(model: torch.nn.Module, images: torch.Tensor, layers: list[ConvLayer]) -> Callable[[], float]:
    picture = torch.zeros(3, 224, 224, dtype=torch.uint8)

    def run() -> float:
        found = capture_activations(model, images[:1], layers)
        started = time.perf_counter()
        for layer in layers:
            shown = strongest_channels(found[layer.name], 0, CHANNELS)
            figure = feature_maps(shown, picture, layer.name, label="", dead=[], seen=1)
            style.save_png(figure, io.BytesIO())
            style.save_png(filter_grid(layer.weight, layer.name), io.BytesIO())
        return (time.perf_counter() - started) / len(layers)

    return run
