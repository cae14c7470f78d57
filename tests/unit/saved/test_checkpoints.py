"""Models in files: which checkpoint of a run is taken, and state dicts."""

from __future__ import annotations

import torch
import torchvision

from cvdist.checkpoints import find
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import SavedModelConfig
from cvdist.saved import open_model
from tests.helpers.checkpoints import add, checkpoint


def test_the_best_checkpoint_is_taken_else_the_newest(tmp_path):
    store = CheckpointStore.at(str(tmp_path), keep=9)
    add(store, checkpoint(0, 30))
    add(store, checkpoint(0, 50))
    assert find.find(str(tmp_path)).endswith("/epoch-0001-step-000050")
    for epoch, correct in ((1, 70), (2, 80), (3, 75)):
        add(store, checkpoint(epoch, correct=correct))
    add(store, checkpoint(3, 50))
    assert find.find(str(tmp_path)).endswith("/epoch-0002")
    assert find.find(str(tmp_path / "epoch-0003")) == str(tmp_path / "epoch-0003")


def test_a_whole_state_dict_keeps_its_classifier(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):  # its classifier has 119 million weights
        vgg = torchvision.models.vgg11()
    vgg.features.to_empty(device="cpu")
    for parameter in vgg.features.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    vgg.classifier = torch.nn.Sequential(
        *(torch.nn.Linear(25088, 16), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(16, 16)),
        *(torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(16, 7)),
    )
    vgg.eval()
    torch.save(vgg.state_dict(), tmp_path / "seven.pth")
    settings = SavedModelConfig(
        source=str(tmp_path / "seven.pth"), model="vgg11", weights_preprocessing="imagenet"
    )
    saved = open_model(settings)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(saved.model(images), vgg(images))
    assert saved.has_classifier and saved.identity.classes == tuple("0123456")
    assert saved.mean == (0.485, 0.456, 0.406)
