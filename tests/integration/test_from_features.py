"""Training from cached features."""

from __future__ import annotations

import pytest
import torch

from cvdist import config as configs
from cvdist.checkpoints.worker import Worker
from cvdist.data.dataset import Shuffle
from cvdist.tracking import NoTracker
from cvdist.training.train import train as train_run
from tests.helpers.feature_caches import SIZE, extract, manifest_of
from tests.helpers.runs import build


@pytest.fixture
def chosen(chosen):
    """With a classifier of 400 thousand weights instead of 119 million."""
    return configs.replace(chosen, hidden_size=16)


def train(chosen, tmp_path, name):
    run = build(configs.replace(chosen, storage=str(tmp_path), name=name), NoTracker())
    train_run(run)
    return run


def test_training_from_a_cache_is_training(chosen, tmp_path):
    """The same losses and counts as without a cache, and a model that takes pictures."""
    chosen = configs.replace(chosen, features_dtype="float32", dropout=0.0, epochs=2, lr=0.01)
    extract(chosen)
    cached = train(configs.replace(chosen, ridge_probe=False), tmp_path, "cached")
    uncached = train(configs.replace(chosen, features=""), tmp_path, "uncached")
    for ours, theirs in zip(cached.progress.history, uncached.progress.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
        assert (ours.train_correct, ours.valid_correct) == (theirs.train_correct, theirs.valid_correct)
    for ours, theirs in zip(cached.model.parameters(), uncached.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    (batch,) = uncached.loader.valid_batches(0, 1, 5)
    (features,) = cached.loader.valid_batches(0, 1, 5)
    cached.model.eval()
    scores = cached.trained(features.images)[features.indices.argsort()]
    torch.testing.assert_close(cached.model(batch.images), scores, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("cached")
def test_a_stopped_windowed_epoch_goes_on_as_it_began(chosen, tmp_path, monkeypatch):
    """Also where the cache fits the node in the meantime."""
    largest = max(entry.raw_bytes for entry in manifest_of(chosen).shards)
    small = configs.replace(
        chosen, local_cache_gb=3 * largest / 1e9, checkpoint_every=2, dropout=0.0, batch_size=3
    )
    whole = train(configs.replace(small, checkpoint_every=0), tmp_path, "whole")
    assert whole.progress.shuffle == Shuffle(1, 1)

    class Stopped(Exception):
        pass

    def stop(self, name, *rest):
        save(self, name, *rest)
        self.wait_for_uploads()
        if name.endswith("000002"):
            raise Stopped

    save = Worker.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "save_checkpoint", stop)
        with pytest.raises(Stopped):
            train(small, tmp_path, "stopped")
    large = configs.replace(small, local_cache_gb=0.0)
    resumed = train(large, tmp_path, "stopped")
    assert resumed.resumed_at == "epoch 1, sample 6"
    assert resumed.progress.history[0].train_loss == pytest.approx(whole.progress.history[0].train_loss)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("cached")
def test_a_moving_average_from_a_cache(chosen, tmp_path):
    run = train(configs.replace(chosen, model_ema_decay=0.5), tmp_path, "average")
    assert run.best.total == 5 and run.evaluated_model()(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 2)
