"""A classifier that is split over the workers learns what one learns, and is whole wherever it is stored."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed import HashStore

from cvdist.checkpoints import find, shards
from cvdist.checkpoints import format as ckpt
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.tensor_shard import shard_of, shard_range
from cvdist.errors import UserError
from cvdist.parallel.head import linear_layers
from cvdist.parallel.modes import powersgd_bytes
from cvdist.runtime.processes import require_same_devices
from tests import feature_caches, pictures
from tests.jobs import run
from tests.split_head import train_case

HIDDEN = 10  # over three workers: 4, 4 and 2 columns


# ------------------------------------------------------------------------------------------- slices and files


@given(st.integers(1, 60), st.integers(1, 12))
def test_parts_are_everything_once(size, workers):
    rows = [i for rank in range(workers) for i in shard_range(size, workers, rank)]
    assert rows == list(range(size))
    whole = torch.arange(size)
    chunks = [shard_of((size,), 0, workers, rank).of(whole) for rank in range(workers)]
    assert all(map(torch.equal, [c for c in chunks if len(c)], whole.chunk(workers)))


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 12), st.integers(0, 1))
def test_what_some_workers_wrote_others_read(tmp_path_factory, writers, readers, size, dim):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(size)
    weight, momentum = torch.randn(size, size), torch.randn(size, size)

    def local(rank, count):
        mine = {"w": shard_of((size, size), dim, count, rank)}
        return shards.slices_by_path(mine, ["other", "w"]), mine["w"]

    states = []
    for rank in range(writers):
        slice_of, mine = local(rank, writers)
        state = {
            "model": {"w": mine.of(weight).clone(), "other": torch.ones(3)},
            "optimizer": {"state": {1: {"momentum_buffer": mine.of(momentum).clone(), "step": torch.ones(())}}},
            "rng": [{"cpu": torch.zeros(2)}],
        }
        rest, split = shards.separate(state, slice_of)
        assert set(split) == {"model/w", "optimizer/state/1/momentum_buffer"}
        shards.write(folder, rank, writers, split)
        states.append(rest)
    read = shards.join(states[0], folder, writers)
    for rank in range(readers):
        slice_of, mine = local(rank, readers)
        found = shards.take_shards(read, slice_of, "cpu")
        assert torch.equal(found["model"]["w"], mine.of(weight))
        assert torch.equal(found["optimizer"]["state"][1]["momentum_buffer"], mine.of(momentum))
        assert torch.equal(found["model"]["other"], torch.ones(3))
    assert torch.equal(shards.whole(read, "cpu")["model"]["w"], weight)


def test_a_damaged_or_missing_part_is_found(tmp_path):
    for rank in range(2):
        mine = shard_of((6, 2), 0, 2, rank)
        shards.write(tmp_path, rank, 2, {"model/w": (torch.ones(mine.local_shape), mine)})
    marked = {"model": {"w": {"cvdist.parts": 0}}}
    assert shards.whole(shards.join(marked, tmp_path, 2), "cpu")["model"]["w"].shape == (6, 2)
    data, receipt = (tmp_path / name for name in shards.names(2, 1))
    written = json.loads(receipt.read_text())
    receipt.write_text(json.dumps({**written, "rows": {"model/w": [3, 900]}}))
    with pytest.raises(ValueError, match="has other rows of model/w than it says"):
        shards.join(marked, tmp_path, 2)
    receipt.write_text(json.dumps({**written, "rows": {}}))
    with pytest.raises(ValueError, match="rows of model/v are missing"):
        shards.join({"model": {"v": {"cvdist.parts": 0}}}, tmp_path, 2)
    receipt.write_text(json.dumps(written))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is not what was written"):
        shards.join(marked, tmp_path, 2)
    data.unlink()
    with pytest.raises(OSError, match="No such file"):
        shards.join(marked, tmp_path, 2)


@pytest.mark.parametrize(
    ("classifier", "workers", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), 2, "this model has 1: leave it out, or choose a VGG with --head vgg"),
        (nn.Identity(), 2, "this model has 0"),
        (nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2)), 2, "needs all columns at once"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
            3,
            "the 4 columns .* too few for 3 workers",
        ),
    ],
)
def test_what_can_not_be_split_is_one_line(classifier, workers, message):
    with pytest.raises(UserError, match=message):
        linear_layers(classifier, workers)


def test_workers_on_gpus_and_on_cpus_are_one_line():
    store = HashStore()
    store.set("device-1", "cuda")
    store.set("device-2", "cpu")
    with pytest.raises(UserError, match="different devices, 2 on cpu and 1 on cuda: use nodes of one kind"):
        require_same_devices(store, 0, 3, "cpu")
    store.set("device-1", "cpu")
    require_same_devices(store, 0, 3, "cpu")


def test_powersgd_compresses_what_gets_smaller():
    assert powersgd_bytes((4096, 25088), 4) == 4 * 4 * (4096 + 25088)
    assert powersgd_bytes((2, 4096), 4) == 4 * 2 * 4096 and powersgd_bytes((4096,), 4) == 4 * 4096


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(module_path):
    """A cache of 17 + 7 pictures, and what all runs have in common."""
    root = module_path
    pictures.write(root / "pictures", {"train/cat": 8, "train/dog": 9, "valid/cat": 3, "valid/dog": 4})
    weights = feature_caches.write_weights(root / "weights.pth")
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
    """Runs on three workers, then on two, in one group each; and some of them on one worker, here."""
    root, common, cached = place
    head, data, plain = {"parallel": "head"}, {"parallel": "data"}, {"dropout": 0.0}
    more = {"clip_grad_norm": 0.5, "model_ema_decay": 0.5, "optimizer": "adamw", "lr": 0.001}
    compared = {
        "cached": {**cached, **head},
        "more": {**cached, **head, **more},
        "pictures": {**head},
        "blocks": {**head, **plain, "trainable_blocks": 1, "backbone_lr_scale": 0.5, "accumulate_steps": 2},
    }
    three = {
        **compared,
        "half": {**cached, **head, "epochs": 1},
        "half-plain": {**cached, **head, **plain, "epochs": 1},
        "whole-plain": {**cached, **head, **plain},
        "compressed": {**cached, **data, **plain, "gradient_compression": "bf16"},
        "low-rank": {**cached, **data, **plain, "gradient_compression": "powersgd", "epochs": 6},
        "long-plain": {**cached, **head, **plain, "epochs": 6},
        "useless": {**cached, **head, "gradient_compression": "bf16"},
        "probe": {**cached, **head, "head": "linear", "hidden_size": 0},
        "auto": {**cached, "epochs": 1},
    }
    found = _group(root, 3, {name: {**common, "name": name, **case} for name, case in three.items()})
    kept = str(shutil.copytree(root / "half-plain" / "epoch-0001", root / "kept"))
    two = {
        "half": {**cached, **head},  # goes on
        "turned": {**cached, **data, **plain, "resume": kept},
    }
    again = _group(root, 2, {name: {**common, "name": name, **case} for name, case in two.items()})
    found |= {f"{name} on two": case for name, case in again.items()}
    alone = RankInfo()
    for name, case in compared.items():
        found[f"{name} alone"] = train_case(
            alone, {**common, **case, "name": f"{name}-alone", "parallel": "auto"}
        )
    return root, found


def _group(root: Path, workers: int, cases: dict[str, dict[str, object]]) -> dict[str, dict]:
    (root / "cases.json").write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    done = run(*launcher, "tests/split_head.py", root / "cases.json", root / "results.json", storage=root)
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


def test_settings_that_do_nothing_are_one_line(runs):
    _, found = runs
    assert "with --parallel head this run averages no gradients" in found["useless"]["error"]
    assert "this model has 1: leave it out, or choose a VGG with --head vgg or mlp" in found["probe"]["error"]
