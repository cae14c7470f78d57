"""The training step on a device that computes by itself: it reads nothing back, and carries no data there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from cvdist import config as configs
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import TrainConfig
from cvdist.distributed.precision import choose_precision
from cvdist.distributed.ranks import RankInfo
from cvdist.errors import UserError
from cvdist.features.copies import DeviceCopy
from cvdist.tracking import NoTracker
from cvdist.training import ema
from cvdist.training.meter import Meter
from cvdist.training.setup import open_run
from cvdist.training.train import train_step
from tests.helpers import feature_caches, pictures

CPU, META = torch.device("cpu"), torch.device("meta")
# What a GPU has to be waited for: numbers read back, and results whose size depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}


class Watch(TorchDispatchMode):
    """Notes operations that wait for the device, and copies to another one."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.waits.append(name)
        to = args[1].device if name == "copy_" else kwargs.get("device")
        if name in ("_to_copy", "copy_") and first is not None and to not in (None, first.device):
            self.copies.append((name, tuple(first.shape)))
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, weights):
    root = tmp_path_factory.mktemp("step")
    pictures.write(root / "pictures", {"train/a": 10, "train/b": 10, "valid/a": 2, "valid/b": 2})
    config = feature_caches.config(
        *(root / "pictures", root / "features", weights, root / "cache"),
        storage=str(root),
        head="mlp",
        hidden_size=16,
        lr=0.01,
        views=2,
    )
    feature_caches.extract(config)
    return config


def test_a_step_from_features_on_the_device_waits_for_nothing(chosen, tmp_path):
    """With dropout, smoothed labels, clipping, an average and class weights: all that a step can have."""
    more = {"clip_grad_norm": 1.0, "label_smoothing": 0.1, "model_ema_decay": 0.9, "class_weights": "a=2"}
    config = configs.replace(chosen, **more)
    worker = Worker(RankInfo(), CheckpointStore.at(str(tmp_path)))
    run = open_run(config, worker, NoTracker())
    run.loader.copy = DeviceCopy(run.loader.copy, CPU)
    meter, before = Meter(CPU, run.mode.traffic), [p.clone() for p in run.trained.parameters()]
    order = run.loader.epoch_order(config.loop.batch_size, config.run.seed, 1, run.loader.shuffle(1))
    batches = run.loader.train_batches(order, 0, 1)
    run.trained.train()
    train_step(
        run, next(batches), 0.01, meter, 4.0
    )  # the first one uploads the epoch's order, and all features
    with Watch() as watch:
        steps = 1 + sum(1 for batch in batches if train_step(run, batch, 0.01, meter, 4.0) is None)
    assert steps == 5 and int(run.ema.n_averaged) == 5
    # The average's counter lies on the CPU, where reading it waits for nobody.
    assert watch.waits == ["_local_scalar_dense"] * 4 and run.ema.n_averaged.device == CPU
    assert meter.take().count == 20
    assert all(not torch.equal(p, b) for p, b in zip(run.trained.parameters(), before, strict=True))


def test_an_epoch_is_uploaded_once(chosen):
    """To a device that has shapes and no values: what is read back from there is an error."""
    loader = feature_caches.loader(chosen)
    on_cpu = feature_caches.loader(chosen)
    loader.copy, loader.device = DeviceCopy(loader.copy, META), META
    order = loader.epoch_order(chosen.loop.batch_size, chosen.run.seed, 1, loader.shuffle(1))
    batches = loader.train_batches(order, 0, 1)
    first = next(batches)
    with Watch() as watch:
        rest = list(batches)
    assert watch.copies == [] and watch.waits == []
    expected = list(on_cpu.train_batches(order, 0, 1))
    for batch, other in zip([first, *rest], expected, strict=True):
        assert batch.images.device == batch.labels.device == META
        assert batch.images.shape == other.images.shape and torch.equal(batch.indices, other.indices)


def test_features_on_the_device_are_those_of_the_node(chosen):
    on_cpu, on_device = feature_caches.loader(chosen), feature_caches.loader(chosen)
    on_device.copy = DeviceCopy(on_device.copy, CPU)
    order = on_cpu.epoch_order(chosen.loop.batch_size, chosen.run.seed, 3, on_cpu.shuffle(1))
    for rank, position in ((0, 0), (1, 8), (0, 20)):
        pairs = [
            (a, b)
            for a, b in zip(
                on_cpu.train_batches(order, rank, 2, position),
                on_device.train_batches(order, rank, 2, position),
                strict=True,
            )
        ]
        assert len(pairs) == (20 - position) // 4
        for a, b in pairs:
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.indices, b.indices) and a.global_size == b.global_size
    for a, b in zip(on_cpu.valid_batches(0, 1, 3), on_device.valid_batches(0, 1, 3), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_the_average_is_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mine = ema.build(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        model(torch.randn(8, 3))
        with torch.no_grad():
            model[0].weight += torch.randn(4, 3)
        ema.update(mine, model, 0.9)
        theirs.update_parameters(model)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.state_dict().items())


def test_gradients_are_not_summed_over_replays():
    config = configs.replace(TrainConfig(), compile="reduce-overhead", accumulate_steps=2)
    with pytest.raises(UserError, match=r"^--compile reduce-overhead replays .* --accumulate-steps: set"):
        configs.check(config)
    configs.check(configs.replace(config, accumulate_steps=1))
    configs.check(configs.replace(config, compile="default"))


def test_tf32_is_float32_without_a_gpu():
    chosen = choose_precision("tf32", CPU)
    assert chosen.name == "float32" and "GPU" in chosen.reason
