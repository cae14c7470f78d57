"""Context managers that observe convolutions and their activations, or change how a model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cvdist.interpret.layers import ConvLayer
from cvdist.models.scratch_cnn import LogSoftmax

Receive = Callable[[ConvLayer, "str | None", Tensor], None]
"""Takes a layer, None with its output, and then the name of its activation with the output of that."""

_ACTIVATIONS = {
    name.lower(): name
    for name in (
        *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish"),
        *("Hardswish", "Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh", "Softplus", "Softsign"),
    )
}
_ACTIVATIONS["leaky_relu"] = _ACTIVATIONS.pop("leakyrelu")
# Functions between a convolution and its activation, by their names.
_PASSED = {
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "dropout", "dropout2d", "feature_dropout"),
    *("max_pool2d", "avg_pool2d", "add", "iadd", "radd", "contiguous"),
}

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
    """Pass the outputs of `layers` to `receive` during the context, before and after their activations.

    The activation of a convolution is the first one that is applied to its output, as a module or a function.
    Normalization, pooling, dropout and additions may lie in between. If there is none, as at the end of a block
    of MobileNet or in front of a linear layer, `receive` gets the convolution's output again, and no name.

    Args:
        model: The model that contains the layers.
        layers: The layers to observe.
        receive: Called with each output. The tensor is valid only during the call, since an activation in place
            overwrites it: copy it to keep it.
    """
    follower = _Follower(receive)
    hooks: list[tuple[nn.Module, Hook]] = []
    for layer in layers:
        hooks.append((layer.module, functools.partial(follower.start, layer)))
    # Appended last: if the model itself is a layer, the hook of the layer runs first.
    hooks.append((model, follower.end))
    with forward_hooks(hooks), follower:
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


class _Follower(TorchFunctionMode):
    """Follows the outputs of convolutions through a forward pass, up to their activations."""

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive
        self._pending: dict[str, tuple[ConvLayer, Tensor]] = {}
        # What became of outputs so far, by the identity of the tensor, which is kept so that it stays unique.
        self._outputs: dict[int, tuple[Tensor, tuple[str, ...]]] = {}

    def start(self, layer: ConvLayer, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._receive(layer, None, output)
        self._pending[layer.name] = (layer, output)
        self._outputs[id(output)] = (output, (layer.name,))

    def end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        for layer, output in self._pending.values():
            self._receive(layer, "", output)
        self._pending.clear()
        self._outputs.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [
            name
            for one in (args[:2] if self._outputs else ())
            for name in self._outputs.get(id(one), (None, ()))[1]
            if name in self._pending
        ]
        result = func(*args, **(kwargs or {}))
        if names and isinstance(result, Tensor):
            word = func.__name__.strip("_")
            if activation := _activation(word, args, kwargs or {}):
                for layer, _ in [self._pending.pop(name) for name in names if name in self._pending]:
                    self._receive(layer, activation, result)
                self._outputs = {
                    key: one for key, one in self._outputs.items() if self._pending.keys() & one[1]
                }
            elif word in _PASSED:
                self._outputs[id(result)] = (result, tuple(names))
        return result


def _activation(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the name of an activation by that of its function; empty if it is none."""
    if function == "hardtanh" and (*args[1:3], *kwargs.values())[:2] == (0.0, 6.0):
        return "ReLU6"
    return _ACTIVATIONS.get(function, "")
