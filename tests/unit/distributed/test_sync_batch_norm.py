"""A batch norm over the batches of several workers, computed by one process in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cvdist.distributed.sync_batch_norm import SyncBatchNorm, synchronize
from cvdist.distributed.traffic import Traffic
from cvdist.errors import UserError


def shared(layer, others=()):
    """`layer` as that of a worker, where the sums of other workers are added in the order of the exchanges."""
    found, left = copy.deepcopy(layer), list(others)
    synchronize(found, Traffic(torch.device("cpu")), 2)
    assert type(found) is SyncBatchNorm
    found.seen = []

    def add_up(sums):
        found.seen.append(sums.clone())
        return sums + left.pop(0) if left else sums

    found.add_up = add_up
    return found


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm2d(3), (5, 3, 4, 4)),
        (nn.BatchNorm1d(4, momentum=None), (6, 4)),
        (nn.BatchNorm3d(2, affine=False), (3, 2, 2, 3, 2)),
        (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    ],
)
def test_it_is_the_batch_norm_of_all_pictures(layer, shape, kind):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).to(kind)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    mine = shared(layer)
    for _ in range(2):
        images = (3 * torch.randn(shape, dtype=kind) + 7).requires_grad_()
        weights, twin = torch.randn(shape, dtype=kind), images.detach().clone().requires_grad_()
        expected, found = layer(images), mine(twin)
        torch.testing.assert_close(found, expected)
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        torch.testing.assert_close(twin.grad, images.grad)
    for one, other in zip(mine.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(dict(mine.named_buffers()), dict(layer.named_buffers()))
    torch.testing.assert_close(mine.eval()(twin), layer.eval()(images))


def test_workers_with_parts_of_a_batch_or_none_have_the_gradients_of_the_whole():
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).double()
    images, weights = (torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    whole = images.clone().requires_grad_()
    (layer(whole) * weights).sum().backward()
    for sizes in ([2, 3], [0, 5]):
        exchanged, gradients = [[], []], []
        for run in range(3):  # the first run learns what is exchanged forward, the second one backward
            workers = [shared(nn.BatchNorm2d(3).double(), exchanged[1 - rank]) for rank in (0, 1)]
            parts = [part.clone().requires_grad_() for part in images.split(sizes)]
            for worker, part, mine in zip(workers, parts, weights.split(sizes), strict=True):
                (worker(part) * mine).sum().backward()
            exchanged = [worker.seen[: run + 1] for worker in workers]
            gradients = torch.cat([part.grad for part in parts])
        torch.testing.assert_close(gradients, whole.grad)
        by_weight = sum(worker.weight.grad for worker in workers)
        torch.testing.assert_close(by_weight, layer.weight.grad)
        for worker in workers:
            torch.testing.assert_close(worker.running_var, layer.running_var)


def test_what_is_no_plain_batch_norm_is_refused():
    class Other(nn.BatchNorm2d):
        pass

    for module, said in ((nn.Linear(1, 1), "trains no batch norm"), (Other(2), "does not know Other")):
        with pytest.raises(UserError, match=said):
            synchronize(module, Traffic(torch.device("cpu")), 2)
