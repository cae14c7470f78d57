"""Estimates, without a GPU, how much of a GPU's memory a training takes, and advises what to change.

A step's forward and backward pass run on tensors that have shapes but no values, while every storage that comes
and goes is counted. What else lies in memory all the time, such as the optimizer's state, is counted from the
weights. Left out is what PyTorch does not allocate (CUDA itself takes about half a gigabyte) and what cuDNN
needs to compute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvdist import models
from cvdist.config import CUDA_GRAPHS, TrainConfig
from cvdist.errors import UserError
from cvdist.models.frozen import FrozenAndTrained
from cvdist.storage import Folder
from cvdist.training import backbone

_CLASSES = 2  # of pictures that nobody has listed yet: the last layer is a small part of a model
_DIGITS = {"mnist": 70_000, "digits": 5_000}  # as bytes, all on the GPU
_BLOCK = 512  # bytes: what PyTorch rounds the sizes of its allocations up to


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one worker has on its GPU.

    Attributes:
        weights: bytes of the whole model.
        state: bytes of the optimizer's state, such as momentum, and of a moving average.
        step: most bytes that a forward and a backward pass add, gradients included.
        data: bytes of features or pictures that stay on the GPU.
    """

    weights: int
    state: int
    step: int
    data: int

    @property
    def peak(self) -> int:
        """Largest number of bytes at any time."""
        return self.weights + self.state + self.step + self.data

    def __str__(self) -> str:
        """Describe the bytes in one line, for logs and reports."""
        parts = {
            "weights": self.weights,
            "optimizer": self.state,
            "a step": self.step,
            "data": self.data,
        }
        listed = " + ".join(f"{size / 1e9:,.2f} {name}" for name, size in parts.items() if size)
        return f"{self.peak / 1e9:,.2f} GB = {listed}"


def estimate(
    config: TrainConfig,
    parts: FrozenAndTrained,
    shape: tuple[int, ...],
    *,
    bfloat16: bool,
    workers: int = 1,
    features: bool = False,
    data: int = 0,
) -> TrainingMemory:
    """Estimate the memory that training `parts` takes on each of `workers` GPUs. Nothing is computed.

    Args:
        config: configuration of the job.
        parts: parts of the model, on any device; the meta device will do.
        shape: shape of one picture, or of one picture's features.
        bfloat16: whether forward passes are cast to bfloat16, or to float16, which takes as much memory.
        workers: number of workers that share a batch.
        features: whether batches are what the frozen layers have made of the pictures.
        data: bytes of the data that stays on the GPU.
    """
    share = -(-config.loop.batch_size // workers)
    portion = -(-share // max(1, min(config.loop.accumulate_steps, share)))
    frozen = None if features else parts.frozen
    weights, state = _weights_and_state(config, parts.trained)
    weights += sum(map(_rounded, _tensors(frozen))) if frozen is not None else 0
    step = _step(frozen, parts.trained, portion, shape, bfloat16=bfloat16)
    if share > portion:  # the whole batch lies there while its portions are computed
        step += 4 * (share - portion) * torch.Size(shape).numel()
    validation = _validation(frozen, parts.trained, config.loop.valid_batch_size, shape, bfloat16=bfloat16)
    return TrainingMemory(weights, state, max(step, validation), data)


def estimate_for_config(config: TrainConfig, *, bfloat16: bool) -> TrainingMemory:
    """Estimate the memory that a job takes on each GPU, from its configuration alone.

    Raises:
        UserError: if there is no such model, or the features can't be read.
    """
    workers = config.runtime.worker_range[0]
    shape, data, classes = _inputs(config)
    parts = skeleton(config, classes)
    features = bool(config.features.uri)
    return estimate(config, parts, shape, bfloat16=bfloat16, workers=workers, features=features, data=data)


def checkpoint_bytes(config: TrainConfig) -> int:
    """Estimate the bytes of one checkpoint of a job, from its configuration alone.

    Raises:
        UserError: if there is no such model, or the features can't be read.
    """
    parts = skeleton(config)
    frozen = sum(map(_rounded, _tensors(parts.frozen))) if parts.frozen is not None else 0
    weights, state = _weights_and_state(config, parts.trained)
    return frozen + weights + state


def trained_parameters(config: TrainConfig, classes: int | None = None) -> int:
    """Return how many of the model's parameters a job trains, without allocating any.

    Args:
        config: as in `skeleton`.
        classes: as in `skeleton`.
    """
    trained = skeleton(config, classes).trained
    return sum(p.numel() for p in trained.parameters() if p.requires_grad)


def skeleton(config: TrainConfig, classes: int | None = None) -> FrozenAndTrained:
    """Build the frozen and the trained modules of a job's model, without values.

    Args:
        config: configuration of the job.
        classes: number of classes. None: that of the job's cache or digits; 2 where pictures are not listed.

    Raises:
        UserError: if there is no such model, or the features can't be read.
    """
    if classes is None:
        classes = _inputs(config)[2]
    input = models.InputSpec(3, config.data.image_size, config.data.image_size)
    if config.data.dataset != "images":
        input = models.InputSpec(1, 28, 28)
    parts = models.frozen_and_trained(models.skeleton(config.model, classes, input))
    backbone.prepare(config, parts)
    return parts


def _weights_and_state(config: TrainConfig, trained: nn.Module) -> tuple[int, int]:
    """Return the bytes of the trained modules, and those of the optimizer's state and a moving average."""
    weights = sum(map(_rounded, _tensors(trained)))
    size = sum(_rounded(p) for p in trained.parameters() if p.requires_grad)
    moments = 2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0)
    return weights, moments * size + (weights if config.loop.model_ema_decay else 0)


def _inputs(config: TrainConfig) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of one picture in a batch, the data's bytes on the GPU, and the number of classes."""
    size = config.data.image_size
    if config.features.uri:
        from cvdist.features import manifest

        cache = manifest.read(Folder.open(config.features.uri, "--features"))
        return cache.feature_shape, cache.raw_bytes * config.features.on_device, len(cache.classes)
    if config.data.dataset == "images":
        return (3, size, size), 0, _CLASSES
    return (1, 28, 28), _DIGITS[config.data.dataset] * 28 * 28, 10


def validation_advice(config: TrainConfig) -> str:
    """Return advice on how a forward pass of validation takes less memory, with the present value."""
    return f"lower --valid-batch-size ({config.loop.valid_batch_size})"


def advice(config: TrainConfig) -> str:
    """Return advice on how a training step takes less memory, with the present values."""
    smaller = f"lower --batch-size ({config.loop.batch_size})"
    if config.loop.compile in CUDA_GRAPHS:
        return smaller
    more = 2 * config.loop.accumulate_steps
    smaller += f", or compute it in portions, for the same gradients, with --accumulate-steps {more}"
    if config.model.trained_of(1) and not config.loop.grad_checkpointing:
        smaller += ", or keep less of it with --grad-checkpointing"
    return smaller


SETUP_ADVICE = (
    "the model, its optimizer and the data that stay there leave no room for a step: take a smaller --model or "
    "--image-size, or a GPU with more memory"
)


@contextmanager
def explain_full_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Raise a `UserError` with `advice` on what to change if the GPU's memory gets full in the block."""
    try:
        yield
    except RuntimeError as error:  # cuBLAS and cuDNN have words of their own for it
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        had = ""
        if device.type == "cuda":
            _, total = torch.cuda.mem_get_info(device)
            mine = torch.cuda.max_memory_reserved(device)
            had = f" (this worker had {mine / 1e9:,.1f} of {total / 1e9:,.1f} GB)"
        raise UserError(f"the memory of the GPU is full{had}: {advice}") from error


def _step(
    frozen: nn.Module | None, trained: nn.Module, batch: int, shape: tuple[int, ...], *, bfloat16: bool
) -> int:
    """Return the most bytes that a training step takes besides the weights, gradients included."""
    with _without_values(bfloat16) as (counter, autocast, imitate):
        images = torch.empty(batch, *shape)
        labels = torch.zeros(batch, dtype=torch.int64)
        (before, _), (after, parameters) = imitate(frozen), imitate(trained)

        def gradients(model: nn.Module) -> tuple[Tensor, ...]:
            with autocast():
                with torch.no_grad():
                    features = before(lambda frozen: frozen(images))
                scores = model(features)
            loss = F.cross_entropy(scores.float(), labels, reduction="sum")
            # Not `backward`, which copies gradients that it may not own, and here more of them than on a GPU.
            return torch.autograd.grad(loss, parameters)

        with counter:
            counter.add(images)
            return counter.most if after(gradients) else 0


def _validation(
    frozen: nn.Module | None, trained: nn.Module, batch: int, shape: tuple[int, ...], *, bfloat16: bool
) -> int:
    with _without_values(bfloat16) as (counter, autocast, imitate):
        images = torch.empty(batch, *shape)
        (before, _), (after, _) = imitate(frozen), imitate(trained)
        with counter, torch.no_grad(), autocast():
            counter.add(images)
            features = before(lambda frozen: frozen(images))
            after(lambda trained: trained(features)).float().softmax(1)
            return counter.most


@contextmanager
def _without_values(bfloat16: bool) -> Iterator[tuple[_Counter, Any, Any]]:
    """Provide a counter of bytes, the context of a forward pass, and a function that imitates a module.

    The function takes a module and returns the parameters of an imitation without values, and a function that
    calls another one with the imitation.
    """

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext()

    def imitate(module: nn.Module | None) -> tuple[Any, list[Tensor]]:
        module = _Holder(module if module is not None else nn.Identity())
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        for tensor in tensors.values():
            counter.leave_out(tensor)
        parameters = [tensor for tensor in tensors.values() if tensor.requires_grad]
        return (lambda use: torch.func.functional_call(module, tensors, (use,))), parameters

    counter = _Counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield counter, autocast, imitate


class _Holder(nn.Module):
    """A module that holds another one, and calls functions with it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, use: Callable[[nn.Module], Any]) -> Any:
        """Return `use(module)`."""
        return use(self.module)


class _Counter(TorchDispatchMode):
    """Counts the bytes of all storages that operations in its context have made, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._known: list[UntypedStorage] = []
        self._sizes: dict[int, int] = {}

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor's storage, or views of it."""
        self._known.append(tensor.untyped_storage())  # kept, so that no other one gets its address
        self._sizes[self._known[-1]._cdata] = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = _round(storage.nbytes())
            self._now += self._sizes[key]
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _rounded(tensor: Tensor) -> int:
    return _round(tensor.numel() * tensor.element_size())


def _round(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
