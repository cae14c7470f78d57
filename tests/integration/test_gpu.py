"""What only a GPU can show; all of it is skipped where there is none. Needs neither Ray nor MLflow.

python -m pytest tests/integration/test_gpu.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from cvdist import config as configs
from cvdist import recipes
from cvdist.data.images.ahead import DecodeAhead
from cvdist.data.images.on_gpu import GpuDecoder
from cvdist.errors import UserError
from cvdist.features import build
from cvdist.features.extract import Extractor
from cvdist.jobs.train import train
from cvdist.training import memory
from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import ROOT, torchrun
from tests.helpers.waiting import kill_with_children, wait_until, work_of

SIZE = 64
EPOCHS = 12  # of the job that is killed: it has to last longer than it takes to see its first checkpoint

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="PyTorch finds no GPU" if torch.version.cuda else "this PyTorch is built without CUDA",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    counts = {
        f"{part}/{name}": count for part, count in (("train", 160), ("valid", 40)) for name in ("cat", "dog")
    }
    return pictures.write(tmp_path_factory.mktemp("photographs"), counts)


@pytest.fixture(autouse=True)
def whole_card():
    """Each test begins with the card's memory to itself."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def job(root: Path, recipe: str, **changes):
    return configs.replace(
        recipes.find(recipe),
        **{
            "storage": str(root / "runs"), "cache": str(root / "cache"), "runtime": "inline",
            "tracking": "none", "device": "cuda", "image_size": SIZE, "epochs": 2, "batch_size": 32,
            "precision": "float32", "name": "run", "log_every_steps": 5, **changes,
        },
    )  # fmt: skip


def transfer(root: Path, weights: Path, recipe: str = "dogs-cats-vgg16", **changes):
    return job(
        root,
        recipe,
        weights=str(weights),
        weights_preprocessing="imagenet",
        model="vgg11",
        hidden_size=64,
        **changes,
    )


def history(config):
    """What the newest checkpoint of a run says of its epochs, after running it."""
    assert train(config) is not None
    folder = max(Path(config.run.storage, config.run.name).glob("epoch-*"), key=lambda path: path.name)
    return json.loads((folder / "checkpoint.json").read_text())["progress"]["history"]


def extract(settings, device="cuda", slices=2):
    config = feature_caches.extraction(settings)
    plan = build.make_plan(config)
    extractor = Extractor(config, plan.fingerprint, torch.device(device))
    with ThreadPoolExecutor(slices) as threads:
        return build.build(
            config, plan, lambda units, store: threads.map(partial(store.process, extractor), units)
        )


def features_of(uri):
    from safetensors.torch import load

    from cvdist.features import manifest, shard
    from cvdist.storage import Folder

    folder = Folder.open(str(uri), "--features")
    found = {}
    for entry in manifest.read(folder).shards:
        raw = shard.unpack(folder.read(entry.object), entry)
        ids = shard.read_ids(raw)
        found |= dict(zip(ids, load(raw)["features"].float(), strict=True))
    return found


@pytest.mark.parametrize("recipe", ["dogs-cats-cnn", "dogs-cats-vgg16"])
def test_it_learns_what_a_processor_learns(tmp_path, photographs, weights, recipe):
    found = {}
    for device in ("cpu", "cuda"):
        changes = {"data": str(photographs), "device": device, "name": device, "dropout": 0.0, "lr": 0.001}
        made = (
            transfer(tmp_path, weights, recipe, **changes)
            if "vgg" in recipe
            else job(tmp_path, recipe, **changes)
        )
        found[device] = history(made)
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=1e-3)
        assert cuda["valid_loss"] == pytest.approx(cpu["valid_loss"], rel=1e-3)
        assert abs(cuda["valid_correct"] - cpu["valid_correct"]) <= 1 and cuda["valid_total"] == 80


@pytest.mark.parametrize(
    "changes", [{"precision": "bfloat16"}, {"precision": "tf32"}, {"compile": "reduce-overhead"}]
)
def test_other_arithmetics_learn_the_same(tmp_path, photographs, weights, changes):
    plain = {"data": str(photographs), "dropout": 0.0, "lr": 0.001}
    (*_, one) = history(transfer(tmp_path, weights, name="one", **plain))
    (*_, other) = history(transfer(tmp_path, weights, name="other", **plain, **changes))
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=0.03)
    assert other["valid_loss"] == pytest.approx(one["valid_loss"], rel=0.05)


@pytest.mark.parametrize("decoder", ["cpu", "nvjpeg"])
def test_extraction_gives_a_processors_features(tmp_path, photographs, weights, decoder):
    common = {"shard_size": 48, "image_size": SIZE}
    for device in ("cpu", "cuda"):
        by = decoder if device == "cuda" else "cpu"
        chosen = feature_caches.config(
            photographs, tmp_path / device, weights, tmp_path / "cache", decoder=by, **common
        )
        extract(chosen, device)
    expected, got = features_of(tmp_path / "cpu"), features_of(tmp_path / "cuda")
    assert expected.keys() == got.keys() and len(got) == 400
    apart = [float((got[path] - one).norm() / one.norm()) for path, one in expected.items()]
    # nvJPEG rounds otherwise than libjpeg-turbo.
    assert max(apart) < (2e-3 if decoder == "cpu" else 0.1), max(apart)


def test_nvjpeg_decodes_what_the_processor_decodes(photographs):
    paths = sorted(str(path.relative_to(photographs)) for path in photographs.rglob("*.jpg"))[:20]

    def decoded(for_gpu):
        ahead = DecodeAhead(str(photographs), SIZE, "squash", threads=2, timeout=60, for_gpu=for_gpu)
        return [one for _, batch in ahead.batches(paths, 8) for one in batch]

    decoder = GpuDecoder(torch.device("cuda", 0), SIZE, "squash")
    decoder.require()
    for got, wanted in zip(decoder(decoded(True)), decoded(False), strict=True):
        assert got.pixels.is_cuda
        assert (got.pixels.cpu().float() - wanted.pixels.float()).abs().mean() < 3


@pytest.mark.parametrize("kind", ["features", "pictures"])
def test_steps_do_not_wait_for_the_card(tmp_path, photographs, weights, kind):
    """PyTorch warns of each wait: at the start, for reports and at the end of epochs, not in steps."""
    changes = {
        "data": str(photographs),
        "batch_size": 4,
        "epochs": 2,
        "log_every_steps": 40,
        "model_ema_decay": 0.9,
    }
    if kind == "features":
        chosen = feature_caches.config(
            photographs, tmp_path / "features", weights, tmp_path / "cache", image_size=SIZE, shard_size=48
        )
        extract(chosen)
        changes |= {"features": str(tmp_path / "features"), "recipe": "dogs-cats-vgg16-features"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(transfer(tmp_path, weights, clip_grad_norm=1.0, **changes))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter((Path(w.filename).name, w.lineno) for w in caught if "synchroniz" in str(w.message))
    assert places, "the warnings have changed their words"
    often = {place: count for place, count in places.items() if count >= 80}  # steps of one epoch
    assert not often, often


def test_the_memory_that_is_foretold_is_what_it_takes(tmp_path, photographs, weights):
    for name, changes in {
        "frozen": {"hidden_size": 2048, "batch_size": 128},
        "trained": {"trainable_stages": 5, "batch_size": 128},
        "portions": {"trainable_stages": 5, "batch_size": 128, "accumulate_steps": 4},
        "bfloat16": {"trainable_stages": 5, "batch_size": 128, "precision": "bfloat16"},
        "again": {"trainable_stages": "all", "batch_size": 128, "grad_checkpointing": True},
    }.items():
        settings = {
            "data": str(photographs),
            "image_size": 224,
            "valid_batch_size": 16,
            "epochs": 1,
            "name": name,
        }
        config = configs.replace(transfer(tmp_path, weights), **{**settings, "num_workers": 1, **changes})
        torch.cuda.reset_peak_memory_stats()
        (found,) = history(config)
        needed = memory.estimate_for_config(config, bfloat16=config.loop.precision == "bfloat16")
        assert found["peak_memory"] == pytest.approx(needed.peak, rel=0.2), f"{name}: {needed}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 320}, "lower --batch-size (320), or compute it in portions"),
        ({}, "lower --valid-batch-size (80)"),
    ],
)
def test_a_full_card_is_one_line_with_what_to_change(tmp_path, photographs, weights, changes, says):
    settings = {"image_size": 224, "trainable_stages": 5, "batch_size": 2, "valid_batch_size": 80, "epochs": 1}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5e9 / total)
    try:
        with pytest.raises(UserError) as caught:
            train(
                configs.replace(transfer(tmp_path, weights, data=str(photographs)), **{**settings, **changes})
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert str(caught.value).startswith("the memory of the GPU is full (this worker had ")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["dogs-cats-cnn", "dogs-cats-vgg16"])
def test_killed_in_mid_epoch_it_ends_with_the_same_bits(tmp_path, photographs, weights, recipe):
    """With --deterministic: SIGKILL after a checkpoint within an epoch, and the same command again."""
    flags = {
        "data": photographs, "storage": tmp_path, "cache": tmp_path / "cache", "image-size": SIZE,
        "batch-size": 4, "epochs": EPOCHS, "checkpoint-every": 30, "tracking": "none", "precision": "bfloat16",
        "device": "cuda",
    }  # fmt: skip
    if "vgg" in recipe:
        flags |= {"weights": weights, "weights-preprocessing": "imagenet", "model": "vgg11"}
        flags |= {"trainable-stages": 2}
    words = [
        recipe,
        "--deterministic",
        *(str(w) for name, value in flags.items() for w in (f"--{name}", value)),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["jobs/train.py", *words, "--name", "killed"]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: killed.poll() is not None or list(tmp_path.glob("killed/[!.]*-step-*/checkpoint.json")),
            "there is a checkpoint within an epoch",
            work_of(killed.pid),
            poll_seconds=0.01,
        )
        assert killed.poll() is None
    finally:
        kill_with_children(killed)
    for name in ("killed", "whole"):
        done = torchrun(1, *words, "--name", name, storage=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("resuming   at epoch" in done.stderr) == (name == "killed"), done.stderr
    ends = [next((tmp_path / name).glob(f"epoch-{EPOCHS:04}*/state.pt")) for name in ("killed", "whole")]
    one, other = (torch.load(end, weights_only=True) for end in ends)
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for key, values in one["optimizer"]["state"].items():
        assert torch.equal(values["momentum_buffer"], other["optimizer"]["state"][key]["momentum_buffer"])
