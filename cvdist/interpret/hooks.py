"""Context managers that observe the outputs of convolutions and ReLUs, or change how a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvdist.interpret.layers import RELUS, ConvLayer
from cvdist.models.scratch_cnn import LogSoftmax

Stage = Literal["before", "after"]
"""`before`: output of a convolution. `after`: output of the ReLU that follows it."""

Receive = Callable[[ConvLayer, Stage, Tensor], None]
"""Takes a layer, the stage of its output, and the output."""

Hook = Callable[[nn.Module, Any, Any], Any]
"""Takes a module, its inputs and its output. Unless it returns None, its result replaces the output."""


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Register forward hooks on modules for the duration of the context, and remove them in any case."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_activations(model: nn.Module, layers: Sequence[ConvLayer], receive: Receive) -> Iterator[None]:
    """Pass the outputs of `layers` to `receive` during the context, before and after ReLU, in order.

    The ReLU of a convolution is the first `nn.ReLU` or `nn.ReLU6` that runs after it and before another
    convolution or linear layer; batch norm or pooling may run in between. If there is none, the network applies
    ReLU as a function, and the output `after` is computed as the ReLU of the convolution's output.

    Args:
        model: The model that contains the layers.
        layers: The layers to observe.
        receive: Called with each output. The tensor is valid only during the call, since an in-place ReLU
            overwrites it: copy it to keep it.
    """
    matcher = _ReluMatcher({id(layer.module): layer for layer in layers}, receive)
    hooks: list[tuple[nn.Module, Hook]] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append((module, matcher.weighted_layer))
        elif isinstance(module, RELUS):
            hooks.append((module, matcher.relu))
    # Appended last: if the model itself is a layer, the hook of the layer runs first.
    hooks.append((model, matcher.end))
    with forward_hooks(hooks):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for the duration of the context."""
    was_training = model.training
    model.eval()
    # A compiled forward pass ignores hooks that were registered after compilation.
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.train(was_training)


@contextmanager
def without_inplace(model: nn.Module) -> Iterator[None]:
    """Turn off in-place layers for the duration of the context, since gradients need the overwritten inputs."""
    changed = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    try:
        for module in changed:
            module.inplace = False  # type: ignore[assignment]
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]


@contextmanager
def without_softmax(model: nn.Module) -> Iterator[None]:
    """Skip a softmax or log-softmax at the end of the model for the duration of the context.

    The model then returns scores. The gradient of a probability near 1 vanishes; that of its score does not.
    """
    last = [module for module in model.modules() if not any(module.children())][-1:]
    ends = [module for module in last if isinstance(module, (nn.Softmax, nn.LogSoftmax, LogSoftmax))]
    with forward_hooks((module, lambda _module, inputs, _output: inputs[0]) for module in ends):
        yield


class _ReluMatcher:
    """Matches each observed convolution with the ReLU that runs after it."""

    def __init__(self, layers: dict[int, ConvLayer], receive: Receive) -> None:
        self._layers, self._receive = layers, receive
        self._pending: tuple[ConvLayer, Tensor] | None = None

    def weighted_layer(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._apply_missing_relu()
        layer = self._layers.get(id(module))
        if layer is not None:
            self._receive(layer, "before", output.detach())
            self._pending = (layer, output.detach())

    def relu(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._pending is not None:
            layer, _ = self._pending
            self._pending = None
            self._receive(layer, "after", output.detach())

    def end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._apply_missing_relu()

    def _apply_missing_relu(self) -> None:
        if self._pending is not None:
            layer, output = self._pending
            self._pending = None
            # Also correct if an in-place function has already applied ReLU: applying it twice changes nothing.
            self._receive(layer, "after", torch.relu(output))
