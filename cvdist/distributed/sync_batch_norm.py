"""Batch norms that normalize by the whole global batch, whatever the number of workers.

PyTorch's own `nn.SyncBatchNorm` computes on GPUs only. The sums are those of Ioffe and Szegedy 2015,
arXiv:1502.03167, added up over the workers: two exchanges of a few numbers for each layer and step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cvdist.distributed.collectives import sum_over_workers
from cvdist.distributed.traffic import Traffic, ring_bytes
from cvdist.errors import UserError


class SyncBatchNorm(_BatchNorm):
    """A batch norm whose mean and variance are those of all workers' batches together, in training."""

    traffic: Traffic
    workers: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalize this worker's batch, float (n, C, ...), where n may be 0. All workers must call this."""
        if not self.training:
            return super().forward(input)
        output, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            share = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if share is None else share
            assert share is not None
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return output

    def add_up(self, sums: Tensor) -> Tensor:
        """Sum a tensor over all workers, in place, and count the traffic."""
        with self.traffic.waiting(ring_bytes(sums.nbytes, self.workers)):
            return sum_over_workers(sums)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any number of dimensions."""


def synchronize(module: nn.Module, traffic: Traffic, workers: int) -> None:
    """Make all batch norms in `module` use the batches of all workers. They keep their names and tensors.

    Raises:
        UserError: If there are none, or some that compute more than a batch norm.
    """
    found = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not found:
        raise UserError("--sync-bn: this run trains no batch norm: leave it out")
    for layer in found:
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise UserError(
                f"--sync-bn does not know {type(layer).__name__}, which this model has: leave it out"
            )
        if workers > 1:
            layer.__class__ = SyncBatchNorm
            layer.traffic, layer.workers = traffic, workers  # type: ignore[assignment]


class _Normalize(torch.autograd.Function):
    """The normalization and its derivatives."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, layer: SyncBatchNorm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output, and of all workers' batches the mean and variance, float64 (C,), and the count."""
        dims, channels, kind = _dims(input), input.shape[1], torch.promote_types(input.dtype, torch.float32)
        count = input.numel() // channels
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=input.device)
        if count:
            variance, mean = (one.double() for one in torch.var_mean(input.to(kind), dims, correction=0))
            sums[:channels], sums[channels:-1] = count * mean, count * (variance + mean.square())
            sums[-1] = count
        total, squares, counted = layer.add_up(sums).split([channels, channels, 1])
        mean = total / counted
        variance = (squares / counted - mean.square()).clamp(min=0)
        output = F.batch_norm(input, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, layer.eps)
        scale = (variance + layer.eps).rsqrt().to(kind)
        ctx.save_for_backward(input, weight, mean.to(kind), scale, counted.to(kind))
        ctx.layer = layer
        ctx.mark_non_differentiable(mean, variance, counted)
        return output, mean, variance, counted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives by input, weight and bias: the last two of this worker's batch alone."""
        input, weight, mean, scale, counted = ctx.saved_tensors
        shape = [1, -1] + [1] * (input.ndim - 2)
        gradient = gradients[0].to(mean.dtype)
        normalized = (input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([gradient.sum(_dims(input)), (gradient * normalized).sum(_dims(input))])
        by_bias, by_weight = sums.clone()
        first, second = (one.view(shape) for one in ctx.layer.add_up(sums) / counted)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        by_input = (gradient - first - normalized * second) * factor.view(shape)
        if weight is None:
            return by_input.to(input.dtype), None, None, None
        return by_input.to(input.dtype), by_weight.to(weight.dtype), by_bias.to(weight.dtype), None


def _dims(input: Tensor) -> list[int]:
    return [0, *range(2, input.ndim)]
