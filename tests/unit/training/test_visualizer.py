"""Pictures of what a network learns, while it is trained."""

from __future__ import annotations

import io

import pytest
import torch

from cvdist import config as configs
from cvdist.config import TrainConfig
from cvdist.errors import UserError
from cvdist.figures import network
from cvdist.models.registry import InputSpec
from cvdist.models.scratch_cnn import scratch_cnn
from cvdist.tracking import NoTracker
from cvdist.training.visualize import Visualizer
from tests.helpers.figures import says

# ----------------------------------------------------------------------------------------- while training


class Recorded(NoTracker):
    """Keeps names, draws nothing."""

    def __init__(self):
        self.names = []

    def log_figure(self, name, draw):
        self.names.append(name)

    def log_artifact(self, name, make):
        self.names.append(name)


def scratch():
    torch.manual_seed(0)
    return scratch_cnn(InputSpec(1, 28, 28), 10, (50,), 0.5)


def test_pictures_of_filters_forming_and_a_resumed_run_goes_on_with_them():
    config = configs.replace(TrainConfig(), epochs=100, visualize_every=40)
    model, tracker = scratch(), Recorded()
    first = Visualizer(config, model, tracker, enabled=True)
    first.start(model, fresh=True)
    for epoch in range(1, 61):
        with torch.no_grad():
            model.conv1.weight += 1
        first.epoch_done(model, epoch)
    assert tracker.names == ["filters/conv1-epoch-0000", "filters/conv1-epoch-0040"]
    again = Visualizer(config, scratch(), Recorded(), enabled=True)
    again.load_state(torch.load(io.BytesIO(saved(first.state())), weights_only=True))
    state = again.state()
    assert set(state["before"]) == {"conv1", "conv2"}
    assert torch.equal(state["before"]["conv1"], scratch().conv1.weight)
    frames = state["frames"]
    assert 15 < len(frames) <= 41 and (frames["60"] - frames["0"]).mean() == pytest.approx(60, abs=1e-3)
    again.start(model, fresh=False)
    assert again.tracker.names == tracker.names


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "enabled"), [({"tracking": "none"}, True), ({"visualize": False}, True), ({}, False)]
)
def test_nothing_is_computed_for_nobody(changes, enabled):
    model, tracker = scratch(), Recorded()
    off = Visualizer(configs.replace(TrainConfig(), **changes), model, tracker, enabled=enabled)
    off.start(model, fresh=True)
    off.epoch_done(model, 1)
    off.finish(None, model)  # what it would look at is not there
    assert not tracker.names and not off.state()["frames"] and not off.state()["before"]


def test_frozen_layers_are_said_to_be_frozen_and_have_no_before():
    model, tracker = scratch(), Recorded()
    model.conv1.requires_grad_(False)
    some = Visualizer(TrainConfig(), model, tracker, enabled=True)
    some.start(model, fresh=True)
    some.epoch_done(model, 1)
    assert set(some.state()["before"]) == {"conv2"} and not tracker.names
    said = says(network.filter_figure("conv1", model.conv1.weight, when="frozen, so unchanged"))
    assert any("frozen" in line for line in said)


@pytest.mark.parametrize("main", [True, False])
def test_a_layer_that_does_not_exist_is_found_before_training_and_on_all_workers(main):
    config = configs.replace(TrainConfig(), visualize_layers="conv9")
    with pytest.raises(
        UserError, match="--visualize-layers conv9: the model has no such convolution; it has 2"
    ):
        Visualizer(config, scratch(), NoTracker(), enabled=main)
