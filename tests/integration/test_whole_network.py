"""Training a network whole: stages with rates of their own, frozen epochs, float16, stages computed again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints import format as ckpt
from cvdist.data.sampler import EpochOrder
from cvdist.errors import UserError
from cvdist.parallel import measure
from cvdist.training import memory
from cvdist.training.train import train
from tests.helpers import pictures
from tests.helpers.runs import Recorder, assert_same_weights, build

SIDE = 32
NETWORK = "shufflenet_v2_x0_5"  # small, with batch norms and without dropout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return pictures.write(folder, {"train/a": 11, "train/b": 9, "valid/a": 2, "valid/b": 2})


def settings(photos, storage, **changes):
    return configs.replace(
        recipes.find("transfer"),
        **{
            "data": str(photos), "cache": str(photos.parent / "cache"), "storage": str(storage), "name": "run",
            "model": NETWORK, "weights": "none", "image_size": SIDE, "resize": "squash", "batch_size": 4,
            "epochs": 2, "lr": 0.01, "lr_scheduler": "constant", "lr_warmup_epochs": 0.0, "device": "cpu",
            "precision": "float32", "log_every_steps": 1, "visualize": False, "channels_last": False, **changes,
        },
    )  # fmt: skip


def make_run(photos, storage, **changes):
    return build(settings(photos, storage, **changes), Recorder())


def test_losses_are_those_of_torchvisions_reference(photos, tmp_path):
    """Twenty steps of SGD with its step schedule and no augmentation, as references/classification/train.py."""
    run = make_run(
        *(photos, tmp_path),
        model="squeezenet1_1",  # without batch norms, which would amplify the rounding of each step tenfold
        features_at="maps",
        epochs=4,
        optimizer="sgd",
        lr=0.002,
        momentum=0.9,
        weight_decay=1e-4,
        norm_weight_decay=1e-4,
        bias_weight_decay=1e-4,
        lr_scheduler="step",
        lr_step_size=2,
    )
    model = copy.deepcopy(run.model).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (run.info.mean, run.info.std))
    losses = []
    for epoch in range(1, 5):
        for rows in EpochOrder(20, 4, seed=0, epoch=epoch).order.split(4):
            pixels, names = run.loader.pictures("train", rows.tolist())
            target = torch.tensor([run.info.classes.index(name) for name in names])
            loss = criterion(model((pixels / 255 - mean) / std), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    train(run)
    assert len(losses) == 20 and max(losses) - min(losses) > 0.1
    assert run.tracker.losses() == pytest.approx(losses, rel=1e-5)


def test_stages_that_are_computed_again_learn_bit_for_bit_the_same(photos, tmp_path):
    """Batch norms collect their statistics once. It takes less memory, as estimated."""
    runs = []
    for again in (False, True):
        run = make_run(photos, tmp_path / str(again), grad_checkpointing=again, sync_bn=again, dropout=0.5)
        train(run)
        runs.append(run)
    plain, again = runs
    assert again.tracker.losses() == plain.tracker.losses()
    assert_same_weights(plain, again)
    large = [configs.replace(run.config, batch_size=512) for run in runs]
    needs = [memory.estimate_for_config(config, bfloat16=False) for config in large]
    assert needs[1].step < 0.7 * needs[0].step and needs[1].weights == needs[0].weights


def test_the_head_alone_is_trained_in_the_first_epochs(photos, tmp_path):
    changes = {"freeze_epochs": 1, "epochs": 2, "weight_decay": 0.1, "checkpoint_every": 2, "layer_decay": 0.5}
    run = make_run(photos, tmp_path, **changes)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    train(run)
    (_, first), (_, second) = (
        (name, ckpt.load(tmp_path / "run" / name).state["model"]) for name in ("epoch-0001", "epoch-0002")
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], first[name])}
    assert changed == {"fc"}  # no weight, and no statistics of a batch norm
    same = [name for name in before if torch.equal(first[name], second[name])]
    assert same == [] and run.progress.best_epoch in (1, 2)


def test_float16_goes_on_with_the_scale_of_its_gradients(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_SIDE", 8)  # products of matrices in float16 take a CPU seconds
    changes = {"precision": "float16", "clip_grad_norm": 1.0, "batch_size": 10}
    whole = make_run(photos, tmp_path / "whole", **changes)
    assert whole.precision.name == "float16" and whole.scaler.get_scale() == 65536
    whole.scaler.set_growth_interval(2)
    train(whole)
    half = make_run(photos, tmp_path / "half", **{**changes, "epochs": 1})
    half.scaler.set_growth_interval(2)
    train(half)
    rest = make_run(photos, tmp_path / "half", **changes)
    assert rest.scaler.state_dict() == half.scaler.state_dict() and rest.scaler.get_scale() != 65536
    train(rest)
    assert rest.scaler.get_scale() == whole.scaler.get_scale()
    assert_same_weights(whole, rest)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"freeze_epochs": 1}, "--freeze-epochs is for the trained stages of a pretrained model"),
        ({"layer_decay": 0.5}, "--layer-decay is for the trained stages of a pretrained model"),
        ({"grad_checkpointing": True}, "--grad-checkpointing is for the trained stages"),
        ({"sync_bn": True}, "--sync-bn: this run trains no batch norm"),
    ],
)
def test_what_needs_trained_stages_says_so(photos, tmp_path, changes, said):
    scratch = {"model": "scratch-cnn-photo", "weights": "", "head": configs.ModelConfig.head}
    with pytest.raises(UserError, match=said):
        make_run(photos, tmp_path, **scratch, **changes)
