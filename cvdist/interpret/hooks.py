"""Forward hooks that see what convolutions and their ReLUs return, and that are always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvdist.interpret.layers import ConvLayer
from cvdist.models.scratch_cnn import LogSoftmax

Stage = Literal["before", "after"]
"""`before`: what a convolution returns; `after`: what the ReLU that follows it returns."""

Receive = Callable[[ConvLayer, Stage, Tensor], None]
Hook = Callable[[nn.Module, Any, Any], Any]
"""Takes a module, its inputs and its output; what it returns, unless None, takes the output's place."""


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Hooks on modules while the context lasts, whatever happens in it."""
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
    """While the context lasts, each forward pass hands what `layers` return to `receive`, in order.

    The ReLU of a convolution is the first `nn.ReLU` that runs after it and before another convolution or linear
    layer, be there a batch norm or a pooling in between. Where none runs, the network applies ReLU as a
    function, and `after` is the ReLU of what the convolution returned. A tensor is valid during the call only:
    a ReLU in place will overwrite it. Copy what is to be kept.
    """
    seen = _Seen({id(layer.module): layer for layer in layers}, receive)
    hooks: list[tuple[nn.Module, Hook]] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append((module, seen.weights))
        elif isinstance(module, nn.ReLU):
            hooks.append((module, seen.relu))
    # Appended last: of a model that is a single layer, the layer's own hook runs first.
    hooks.append((model, seen.end))
    with forward_hooks(hooks):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without dropout and with the batch norms' averages, while it lasts."""
    was_training = model.training
    model.eval()
    # A compiled forward pass does not know of hooks that came later.
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.train(was_training)


@contextmanager
def not_in_place(model: nn.Module) -> Iterator[None]:
    """No layer overwrites its input while the context lasts: gradients need what was there."""
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
    """While it lasts, a model that ends with a (log-)softmax returns what went into that.

    The gradient of a probability near 1 is next to nothing, that of its score is not.
    """
    last = [module for module in model.modules() if not any(module.children())][-1:]
    ends = [module for module in last if isinstance(module, (nn.Softmax, nn.LogSoftmax, LogSoftmax))]
    with forward_hooks((module, lambda _module, inputs, _output: inputs[0]) for module in ends):
        yield


class _Seen:
    """Which convolution still waits for its ReLU."""

    def __init__(self, layers: dict[int, ConvLayer], receive: Receive) -> None:
        self._layers, self._receive = layers, receive
        self._waiting: tuple[ConvLayer, Tensor] | None = None

    def weights(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._no_more_relu()
        layer = self._layers.get(id(module))
        if layer is not None:
            self._receive(layer, "before", output.detach())
            self._waiting = (layer, output.detach())

    def relu(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._waiting is not None:
            layer, _ = self._waiting
            self._waiting = None
            self._receive(layer, "after", output.detach())

    def end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._no_more_relu()

    def _no_more_relu(self) -> None:
        if self._waiting is not None:
            layer, output = self._waiting
            self._waiting = None
            # Right also after a function in place: the ReLU of what went through ReLU is itself.
            self._receive(layer, "after", torch.relu(output))
