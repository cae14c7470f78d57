"""A classifier that is split over the workers learns what one learns, and is whole wherever it is stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cvdist.checkpoints import find, shards
from cvdist.checkpoints import format as ckpt
from cvdist.distributed.ranks import RankInfo
from k8s.services import free_port
from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import run
from tests.helpers.split_head import train_case

HIDDEN = 10  # over three workers: 4, 4 and 2 columns


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(module_path, weights):
    """A cache of 17 + 7 pictures, and what all runs have in common."""
    root = module_path
    pictures.write(root / "pictures", {"train/cat": 8, "train/dog": 9, "valid/cat": 3, "valid/dog": 4})
    config = feature_caches.config(root / "pictures", root / "features", weights, root / "cache")
    feature_caches.extract(config)
    common = {
        "weights": str(weights), "weights_preprocessing": "imagenet", "model": "vgg11", "image_size": 32,
        "data": str(root / "pictures"), "cache": str(root / "cache"), "storage": str(root), "tracking": "none",
        "precision": "float32", "hidden_size": HIDDEN, "batch_size": 6, "epochs": 2, "log_every_steps": 1,
        "lr": 0.01, "lr_scheduler": "constant", "lr_warmup_epochs": 0.0,
        "dropout": 0.5, "device": "cpu", "visualize": False, "ridge_probe": False,
    }  # fmt: skip
    return root, common, {"features": str(root / "features")}


@pytest.fixture(scope="module")
def runs(place):
    """Runs on three workers, then on two of them; and some on one worker, here."""
    root, common, cached = place
    head, data, plain = {"parallel": "head"}, {"parallel": "data"}, {"dropout": 0.0}
    more = {"clip_grad_norm": 0.5, "model_ema_decay": 0.5, "optimizer": "adamw", "lr": 0.001}
    blocks = {
        **plain, "trainable_stages": 1, "freeze_epochs": 1, "backbone_lr_scale": 0.5, "accumulate_steps": 2,
        "cutmix_alpha": 1.0,
    }  # fmt: skip
    compared = {
        "cached": {**cached, **head},
        "more": {**cached, **head, **more},
        "pictures": {**head, "mixup_alpha": 0.4},
        "blocks": {**head, **blocks},
    }
    # All that makes workers depend on each other: with it, they learn what one learns.
    whole = {
        **data, **plain, "model": "resnet18", "weights": "none", "weights_preprocessing": "", "head": "linear",
        "hidden_size": 0, "image_size": 64, "lr": 0.0005, "epochs": 3, "patience": 1, "min_delta": 1.0,
        "sync_bn": True, "grad_checkpointing": True, "freeze_epochs": 1, "layer_decay": 0.7,
        "class_weights": "cat=3", "label_smoothing": 0.1, "mixup_alpha": 0.4, "cutmix_alpha": 1.0,
        "balanced_sampling": True, "select_by": "macro_f1",
    }  # fmt: skip
    weighed = {**cached, **plain, "class_weights": "balanced", "select_by": "loss", "clip_grad_norm": 0.5}
    three = {
        **compared,
        "whole": whole,
        "weighed": {**weighed, **head},
        "weighed-averaged": {**weighed, **data},
        "half": {**cached, **head, "epochs": 1},
        "half-plain": {**cached, **head, **plain, "epochs": 1},
        "whole-plain": {**cached, **head, **plain},
        "averaged": {**data, **blocks},
        "compressed": {**cached, **data, **plain, "gradient_compression": "bf16"},
        "low-rank": {**cached, **data, **plain, "gradient_compression": "powersgd", "epochs": 6},
        "long-plain": {**cached, **head, **plain, "epochs": 6},
        "useless": {**cached, **head, "gradient_compression": "bf16"},
        "probe": {**cached, **head, "head": "linear", "hidden_size": 0},
        "auto": {**cached, "epochs": 1},
    }
    two = {
        "whole": {**whole, "name": "whole-two"},
        "half": {**cached, **head},  # goes on
        "turned": {**cached, **data, **plain, "resume": str(root / "half-plain" / "epoch-0001")},
    }
    found, again = _groups(root, {3: three, 2: two}, common)
    found |= {f"{name} on two": case for name, case in again.items()}
    alone = RankInfo()
    for name, case in {**compared, "whole": whole, "weighed": weighed}.items():
        found[f"{name} alone"] = train_case(
            alone, {**common, **case, "name": f"{name}-alone", "parallel": "auto"}
        )
    return root, found


def _groups(root: Path, cases: dict[int, dict], common: dict[str, object]) -> list[dict[str, dict]]:
    """What became of the cases by the number of workers, the largest first."""
    groups = [
        {
            "workers": workers,
            "port": free_port(),
            "cases": {name: {**common, "name": name, **case} for name, case in named.items()},
        }
        for workers, named in cases.items()
    ]
    (root / "groups.json").write_text(json.dumps(groups))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(groups[0]["workers"]), "tests/helpers/split_head.py"]
    done = run(*launcher, root / "groups.json", root / "results.json", storage=root)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results.json").read_text())


def losses(case):
    return [step["step/loss"] for step in case["steps"]]


@pytest.mark.parametrize("name", ["cached", "more", "pictures", "blocks"])
def test_a_split_head_learns_what_one_worker_learns(runs, name):
    """With dropout as well: all workers use the masks that one would draw."""
    _, found = runs
    split, alone = found[name], found[f"{name} alone"]
    assert split["mode"] == "head" and alone["mode"] == "data" and len(losses(split)) == 6
    assert losses(split) == pytest.approx(losses(alone), rel=2e-5)
    assert (split["correct"], split["total"]) == (alone["correct"], 7)
    for step in split["epochs"]:
        assert step["train/total"] == 17 and step["valid/total"] == 7


def test_workers_that_average_gradients_learn_what_one_learns(runs):
    """Of frozen and of trained blocks, in several micro-batches, none of which is of the same size."""
    _, found = runs
    averaged, alone = found["averaged"], found["blocks alone"]
    assert averaged["mode"] == "data" and losses(averaged) == pytest.approx(losses(alone), rel=1e-3)
    assert (averaged["correct"], averaged["total"]) == (alone["correct"], 7)
    assert averaged["logged"] == alone["logged"]


def test_workers_that_share_batch_norms_and_class_weights_learn_what_one_learns(runs):
    """Of a balanced draw: from scratch, with a frozen epoch, with each stage computed again, stopped early."""
    _, found = runs
    alone = found["whole alone"]
    assert len(losses(alone)) == 6  # two epochs of three, in which the score did not rise by 1
    for several in (found["whole"], found["whole on two"]):
        assert several["mode"] == "data" and losses(several) == pytest.approx(losses(alone), rel=1e-3)
        assert several["correct"] == alone["correct"] and several["logged"] == alone["logged"]
        for step, expected in zip(several["epochs"], alone["epochs"], strict=True):
            for name in ("valid/total", "valid/correct", "valid/balanced_accuracy", "valid/macro_f1"):
                assert step[name] == expected[name]
            assert step["valid/loss"] == pytest.approx(expected["valid/loss"], rel=1e-3)
    for name in ("weighed", "weighed-averaged"):
        assert losses(found[name]) == pytest.approx(losses(found["weighed alone"]), rel=2e-5)
        assert found[name]["correct"] == found["weighed alone"]["correct"]


def test_it_goes_on_with_other_numbers_of_workers_and_in_the_other_mode(runs):
    _, found = runs
    half, rest, expected = losses(found["half"]), losses(found["half on two"]), losses(found["cached"])
    assert len(half) == 3 and rest[:3] == half  # told again, in case they had been lost
    assert rest == pytest.approx(expected, rel=2e-5)
    turned = found["turned on two"]
    assert turned["mode"] == "data"
    assert losses(turned) == pytest.approx(losses(found["whole-plain"]), rel=2e-5)


def test_checkpoints_are_whole_models_in_parts_of_each_worker(runs):
    root, _ = runs
    folder = root / "cached" / "epoch-0002"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoint.json",
        "state.pt",
        *(name for rank in range(3) for name in shards.names(3, rank)),
    }
    in_parts = ckpt.load(folder, whole=False).state
    assert isinstance(in_parts["model"]["classifier.0.weight"], shards.Pieces)
    assert isinstance(in_parts["optimizer"]["state"][0]["momentum_buffer"], shards.Pieces)
    # What one worker holds is a third of it, and none has gathered the rest.
    sizes = [(folder / shards.names(3, rank)[0]).stat().st_size for rank in range(3)]
    assert sizes == pytest.approx([sum(sizes) * share for share in (0.4, 0.4, 0.2)], rel=0.02)
    _, tensors = find.read(str(folder))
    alone, expected = find.read(str(root / "cached-alone" / "epoch-0002"))
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert alone.parallel == "data"


def test_the_logged_model_is_an_ordinary_one(runs):
    _, found = runs
    for name in ("cached", "more", "pictures", "blocks"):
        assert found[name]["logged"] == found[f"{name} alone"]["logged"] != {}


def test_bytes_a_step_are_what_the_note_says(runs):
    _, found = runs
    # One sum of 6 x 10 float32 over three workers: each sends 4/3 of it.
    assert found["cached"]["steps"][0]["step/bytes_sent"] == pytest.approx(4 / 3 * 6 * HIDDEN * 4)
    assert found["cached"]["note"].startswith("head: 0.00032 MB sent a step by each worker, ")
    weights = 25088 * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 2
    plain, half = (4 / 3 * weights * size for size in (4, 2))
    assert f"{plain / 1e6:.3g} MB with --parallel data" in found["cached"]["note"]
    assert found["compressed"]["steps"][0]["step/bytes_sent"] == pytest.approx(half)
    sent = [step["step/bytes_sent"] for step in found["low-rank"]["steps"]]
    assert sent[0] == pytest.approx(plain) and sent[-1] < plain / 2
    for step in found["cached"]["steps"]:
        times = [step[f"step/{name}_seconds"] for name in ("data", "compute", "communication")]
        # Waiting is a mean over the workers, and may exceed the step of the one that tells of it.
        assert min(times) >= 0 and sum(times) >= 0.99 * step["step/seconds"]
        assert step["step/roofline_fraction"] > 0


def test_compressed_gradients_learn_nearly_the_same(runs):
    _, found = runs
    plain = losses(found["whole-plain"])
    assert losses(found["compressed"]) == pytest.approx(plain, rel=0.02)
    low = losses(found["low-rank"])
    assert low[:6] == pytest.approx(plain, rel=2e-5)  # its first ten steps are exact
    assert low == pytest.approx(losses(found["long-plain"]), rel=0.05)


def test_auto_says_what_it_chose_and_why(runs):
    _, found = runs
    assert found["auto"]["mode"] in ("head", "data")
    assert "--parallel auto: about " in found["auto"]["note"] and "Gbit/s" in found["auto"]["note"]
    assert found["cached alone"]["note"] == "data (one worker: nothing to exchange)"


def test_settings_that_do_nothing_are_one_line_on_all_workers(runs):
    _, found = runs
    assert "with --parallel head this run averages no gradients" in found["useless"]["error"]
    assert "this model has 1: leave it out, or choose a VGG with --head vgg or mlp" in found["probe"]["error"]
