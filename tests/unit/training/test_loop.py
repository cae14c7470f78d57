"""The loop alone, in this process."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import v2

from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.errors import UserError
from cvdist.training.train import train
from cvdist.training.validation import validate
from tests.helpers.runs import Recorder, after_steps, assert_same_weights, few_digits, make_run, train_and_kill


@pytest.fixture(autouse=True, scope="module")
def fewer():
    with few_digits():
        yield


def before_validation(run, number, action):
    """Let `action` happen once, when the run begins its validation of that number."""
    batches, begun = run.loader.valid_batches, []

    def valid_batches(*arguments):
        begun.append(1)
        if len(begun) == number:
            action()
        return batches(*arguments)

    run.loader.valid_batches = valid_batches


def names(folder):
    return [one.name for one in CheckpointStore.at(str(folder)).list()]


def losses(folder, **changes):
    run = make_run(folder, **changes)
    train(run)
    return run.tracker.losses()


def test_learns_and_reports_exact_counts(tmp_path):
    recorder = Recorder()
    summary = train(make_run(tmp_path, recorder, epochs=3))
    assert summary.best.valid_correct > 160 and summary.best.valid_total == 200
    assert [step for step, _ in recorder.epochs] == [1, 2, 3]
    assert [step for step, _ in recorder.steps] == list(range(1, 61))
    for _, values in recorder.epochs:
        assert values["train/total"] == 800 and values["valid/total"] == 200
        assert values["valid/accuracy"] == values["valid/correct"] / 200
    # The epoch's figures are the sums of its steps'.
    first = [values for _, values in recorder.steps[:20]]
    assert sum(values["step/correct"] for values in first) == recorder.epochs[0][1]["train/correct"]
    mean = sum(values["step/loss"] * values["step/total"] for values in first) / 800
    assert mean == pytest.approx(recorder.epochs[0][1]["train/loss"], rel=1e-9)


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    one = losses(tmp_path / "a")
    assert losses(tmp_path / "b") == one != losses(tmp_path / "c", seed=1)


def test_accumulation_gives_the_same_gradients(tmp_path):
    whole = losses(tmp_path / "a", dropout=0.0, batch_size=39)
    parts = losses(tmp_path / "b", dropout=0.0, batch_size=39, accumulate_steps=4)
    assert parts == pytest.approx(whole, rel=2e-4)


def test_resumed_in_mid_epoch_ends_bit_identical(tmp_path):
    """Dropout, momentum, average, augmentation, mixtures, schedule, balance; stopped between checkpoints."""
    changes = {
        "mixup_alpha": 0.4,
        "cutmix_alpha": 1.0,
        "balanced_sampling": True,
        "class_weights": "3=2",
        "epochs": 2,
        "checkpoint_every": 5,
        "model_ema_decay": 0.9,
        "dropout": 0.5,
        "rotation": 10.0,
        "lr_scheduler": "cosine",
        "log_every_steps": 3,
    }
    whole = make_run(tmp_path / "whole", **changes)
    train(whole)
    train_and_kill(make_run(tmp_path / "parts", **changes), 20 + 13 + 1)
    rest = make_run(tmp_path / "parts", **changes)
    assert (rest.progress.epoch, rest.progress.position) == (1, 10 * 40)
    train(rest)
    assert_same_weights(whole, rest)
    for one, other in zip(whole.progress.history, rest.progress.history, strict=True):
        assert (one.train_correct, one.valid_correct) == (other.train_correct, other.valid_correct)
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-12)
        assert one.valid_loss == other.valid_loss


def test_a_finished_run_started_again_has_nothing_to_do(tmp_path):
    first = train(make_run(tmp_path))
    again = train(make_run(tmp_path))
    assert (again.best.valid_correct, again.epochs) == (first.best.valid_correct, 1)
    assert again.first_step_at == 0
    longer = train(make_run(tmp_path, epochs=2))
    assert longer.epochs == 2


def test_best_model_is_the_best_epochs(tmp_path):
    logged = []

    class Keeper(Recorder):
        def log_model(self, model, *_, step, **__):
            logged.append((step, {k: v.clone() for k, v in model.state_dict().items()}))

    # The third epoch's rate ruins the model: the second is the best.
    recorder = Keeper()
    run = make_run(tmp_path, recorder, epochs=3)
    usual = run.schedule
    run.schedule = lambda done: usual(done) if done < 2 else 1.0
    train(run)
    ((step, state),) = logged
    assert step == run.progress.best_epoch == 2
    best = ckpt.load(tmp_path / "run" / "epoch-0002")
    assert all(torch.equal(state[name], tensor) for name, tensor in best.state["model"].items())


def test_broken_loss_stops_with_step_and_advice(tmp_path):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in step \d of epoch 1, .*: lower --lr"):
        train(make_run(tmp_path, lr=1e9))
    assert not (tmp_path / "run" / "epoch-0001").exists()


def test_one_bad_sample_is_named_with_its_step_and_spoils_no_checkpoint(tmp_path):
    run = make_run(tmp_path, log_every_steps=10, checkpoint_every=4)
    batches, read = run.loader.train_batches, []

    def with_a_bad_one(*arguments):
        for number, batch in enumerate(batches(*arguments), start=1):
            if number == 6:
                batch.images[3] = math.nan
                read.extend(batch.indices.tolist())
            yield batch

    run.loader.train_batches = with_a_bad_one
    with pytest.raises(
        UserError, match=r"the loss became nan in step 6 of epoch 1, whose 40 training"
    ) as error:
        train(run)
    run.worker.wait_for_uploads()
    assert all(f"row {row}" in str(error.value) for row in read[:8])
    assert names(tmp_path / "run") == ["epoch-0001-step-000004"]
    assert all(tensor.isfinite().all() for tensor in make_run(tmp_path).model.state_dict().values())


def test_weights_that_overflow_behind_a_finite_loss_are_not_saved(tmp_path):
    run = make_run(tmp_path, checkpoint_every=2)
    after_steps(run, 4, lambda: next(run.model.parameters()).data[0].fill_(math.inf))
    with pytest.raises(
        UserError, match="no finite numbers any more at epoch-0001-step-000004, which is not saved"
    ):
        train(run)
    run.worker.wait_for_uploads()
    assert names(tmp_path / "run") == ["epoch-0001-step-000002"]


@pytest.fixture(scope="module")
def three_epochs(module_path):
    """A run without interruption, and the folder with its checkpoints."""
    run = make_run(module_path / "three", epochs=3, keep_checkpoints=3)
    train(run)
    return run, module_path / "three"


@pytest.mark.parametrize("file", ["state.pt", "checkpoint.json"])
def test_the_newest_good_checkpoint_is_used(tmp_path, three_epochs, caplog, file):
    """One flipped bit, in the middle of numbers."""
    whole, folder = three_epochs
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "epoch-0003")
    path = tmp_path / "run" / "epoch-0002" / file
    content = bytearray(path.read_bytes())
    at = content.index(b'"valid_correct": ') + 18 if file == "checkpoint.json" else len(content) // 2
    content[at] ^= 1
    path.write_bytes(content)
    with caplog.at_level("WARNING", "cvdist"):
        run = make_run(tmp_path, epochs=3)
    assert "epoch-0002 of this run is damaged" in caplog.text and "trying the one before" in caplog.text
    assert run.progress.epoch == 1
    train(run)
    assert_same_weights(whole, run)


def test_a_checkpoint_is_of_its_moment_though_it_is_written_later(tmp_path):
    """Written when training has gone on by an epoch, it has the weights and counts of its own time."""
    release = threading.Event()
    run = make_run(tmp_path, epochs=2)
    save, states = run.worker.save_checkpoint, {}

    def save_late(name, score, at, fill, awaited=()):
        states[name] = ({k: v.clone() for k, v in run.model.state_dict().items()}, len(run.progress.history))

        def wait_and_fill(folder):
            if name == "epoch-0001":
                release.wait(30)
            fill(folder)

        save(name, score, at, wait_and_fill)

    run.worker.save_checkpoint = save_late
    before_validation(run, 2, release.set)
    train(run)
    for name, (weights, epochs) in states.items():
        saved = ckpt.load(tmp_path / "run" / name)
        assert len(saved.progress.history) == epochs
        assert all(torch.equal(saved.state["model"][key], tensor) for key, tensor in weights.items())


def test_a_checkpoint_that_can_not_be_stored_ends_the_run_with_the_reason(tmp_path):
    run = make_run(tmp_path, epochs=3)
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"the checkpoint .*epoch-0001 could not be written"):
        train(run)


def test_moving_average_is_validated_and_logged(tmp_path):
    run = make_run(tmp_path, model_ema_decay=0.99)
    train(run)
    averaged, trained = run.ema.module.state_dict(), run.model.state_dict()
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)
    assert run.best.correct == validate(run).correct


def test_validation_shows_how_far_it_is(tmp_path, monkeypatch):
    run, shown = make_run(tmp_path), []
    size = run.info.valid_size
    batches = list(run.loader.valid_batches(0, 1, size // 4))
    monkeypatch.setattr(run.loader, "valid_batches", lambda *_: iter(batches))
    monkeypatch.setattr(run.line, "due", lambda: True)
    monkeypatch.setattr(run.line, "show", lambda text, done: shown.append((text, done)))
    validate(run)
    parts = [0.25, 0.5, 0.75, 1.0]
    assert shown == [(f"validation of {size} pictures  {part:.0%}", part) for part in parts]


def test_bfloat16_autocast_learns(tmp_path):
    run = make_run(tmp_path, precision="bfloat16", epochs=2, channels_last=True)
    assert train(run).best.valid_correct > 120
    assert next(run.model.parameters()).dtype == torch.float32


# --------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_of_another_model_is_refused(tmp_path):
    train(make_run(tmp_path))
    saved = ckpt.load(tmp_path / "run" / "epoch-0001")
    other = ckpt.ModelIdentity("scratch-cnn", ("cat", "dog"), 3, 224, 224)
    with pytest.raises(UserError, match=r"is of model scratch-cnn \(10 classes, 1x28x28\), this run trains"):
        ckpt.require_fit(saved, other, "x")


@pytest.mark.parametrize("damage", ["truncated", "pickle", "meta not json", "other format"])
def test_damaged_checkpoints_are_named_and_run_no_code(tmp_path, damage):
    train(make_run(tmp_path))
    folder = tmp_path / "run" / "epoch-0001"
    state, meta = folder / "state.pt", folder / "checkpoint.json"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"model": Bomb(tmp_path / "ran")}, state)
    elif damage == "meta not json":
        meta.write_text("{")
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    with pytest.raises(UserError, match="of this run"):
        make_run(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_differs_from_the_checkpoint_is_said_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cvdist")
    run = make_run(tmp_path)
    train(run)
    run.worker.wait_for_uploads()
    train(make_run(tmp_path))
    assert "resuming" in caplog.text and "other than in the checkpoint" not in caplog.text
    train(make_run(tmp_path, epochs=2, batch_size=20, valid_fraction=0.3))
    (line,) = (line for line in caplog.messages if "other than in the checkpoint" in line)
    assert "--batch-size 20 (was 40)" in line and "--epochs 2 (was 1)" in line and "--lr " not in line
    assert "training pictures 700 (was 800), validation pictures 300 (was 200), their SHA-256" in line


@pytest.mark.parametrize(("changes", "position"), [({"batch_size": 20}, 200), ({"valid_fraction": 0.3}, 0)])
def test_an_epoch_goes_on_with_another_batch_size_and_begins_again_with_other_pictures(
    tmp_path, caplog, changes, position
):
    """Of a batch of any size the position says how many samples are done; of other pictures it says nothing."""
    caplog.set_level(logging.INFO, "cvdist")
    train_and_kill(make_run(tmp_path, checkpoint_every=5), 7)
    run = make_run(tmp_path, **changes)
    assert (run.progress.epoch, run.progress.position) == (0, position)
    assert ("epoch 1 begins again" in run.changed) == (position == 0)
    train(run)
    assert run.progress.history[0].train_total == run.info.train_size


class Bomb:
    """What a hostile file would do when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_the_logged_rates_are_those_of_the_optimizer(tmp_path, scheduler):
    """Of each step, and of each epoch that of its last step, also where the run is killed and continued."""
    recorder, held = Recorder(), {}

    def noting(run):
        batches = run.loader.train_batches

        def train_batches(order, *arguments):
            first = (order.epoch - 1) * 20 + (arguments[2] // 40)
            for step, batch in enumerate(batches(order, *arguments), start=first + 1):
                yield batch
                (held[step],) = {group["lr"] for group in run.optimizer.param_groups}

        run.loader.train_batches = train_batches
        return run

    settings = {
        "epochs": 3,
        "lr": 0.1,
        "lr_scheduler": scheduler,
        "lr_warmup_epochs": 0.5,
        "checkpoint_every": 5,
    }
    train_and_kill(noting(make_run(tmp_path, recorder, **settings)), 33)
    run = noting(make_run(tmp_path, recorder, **settings))
    assert (run.progress.epoch, run.progress.position) == (1, 10 * 40)
    train(run)
    steps = {step: values["step/learning_rate"] for step, values in recorder.steps}
    epochs = {epoch: values["train/learning_rate"] for epoch, values in recorder.epochs}
    assert list(held) == list(steps) == list(range(1, 61)) and steps == held
    assert epochs == {epoch: held[20 * epoch] for epoch in (1, 2, 3)}
    # By hand: linear over 10 steps, never 0, then half a cosine over 50 steps, or constant.
    assert [held[step] for step in (1, 2, 10)] == pytest.approx([0.001, 0.01, 0.09])
    cosine = [0.05 * (1 + math.cos(math.pi * (step - 11) / 50)) for step in range(11, 61)]
    assert [held[step] for step in range(11, 61)] == pytest.approx(
        cosine if scheduler == "cosine" else [0.1] * 50
    )
    assert 0 < held[60] == epochs[3]


def test_memory_that_is_full_before_the_first_step_is_one_line(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 MiB.")

    monkeypatch.setattr("cvdist.training.setup.models.build_model", fill)
    with pytest.raises(UserError, match="the memory of the GPU is full: the model, its optimizer and") as error:
        make_run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mixed", [False, True])
def test_class_weights_are_those_of_cross_entropy(tmp_path, mixed):
    """One step of a run in three portions is a step of PyTorch's weighted loss on all of them, mixed or not."""
    changes = {"dropout": 0.0, "class_weights": "0=3,7=0.5", "label_smoothing": 0.1, "batch_size": 800}
    changes |= {"mixup_alpha": 1.0} if mixed else {}
    run = make_run(tmp_path / "a", accumulate_steps=3, momentum=0.0, lr=1.0, **changes)
    model = copy.deepcopy(run.model).train()
    images, labels = run.loader.splits["train"].images, run.loader.splits["train"].labels
    order = run.loader.epoch_order(800, 0, 1, run.loader.shuffle(1)).order
    weight = torch.ones(10)
    weight[0], weight[7] = 3, 0.5
    total, images, labels = weight[labels].sum(), images[order].float(), labels[order]
    if mixed:
        mixup = v2.MixUp(num_classes=10)
        mixup._dist = SimpleNamespace(sample=lambda _: run.loader.mixing.draw(1, 0).share)
        images, labels = mixup(images, labels)
    images = run.loader._normalize(images)
    criterion = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum")
    loss = criterion(model(images), labels) / total
    loss.backward()
    train(run)
    for (name, before), after in zip(model.named_parameters(), run.trained.parameters(), strict=True):
        torch.testing.assert_close(before - before.grad, after, rtol=1e-4, atol=1e-5, msg=name)
    assert run.progress.history[0].train_loss == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("select_by", ["balanced_accuracy", "macro_f1", "loss"])
def test_the_best_checkpoint_is_chosen_by_what_is_named(tmp_path, select_by):
    recorder = Recorder()
    run = make_run(tmp_path, recorder, epochs=3, select_by=select_by, balanced_sampling=True, lr=0.1)
    summary = train(run)
    values = [(-1 if select_by == "loss" else 1) * step[f"valid/{select_by}"] for _, step in recorder.epochs]
    assert summary.best.epoch == 1 + values.index(max(values))
    assert CheckpointStore.at(str(tmp_path / "run")).best().name == f"epoch-{summary.best.epoch:04}"
    record = run.progress.history[summary.best.epoch - 1]
    assert (
        summary.by_class
        == f"balanced accuracy {record.valid_balanced_accuracy:.2%}, macro F1 {record.valid_macro_f1:.4f}"
    )
    if select_by == "loss":
        with pytest.raises(UserError, match=r"chose the best epoch by loss: set --select-by as it was"):
            make_run(tmp_path, epochs=3)


def test_a_training_without_gain_ends_early_and_stays_ended(tmp_path):
    changes = {"epochs": 9, "patience": 2, "min_delta": 0.5}
    train_and_kill(make_run(tmp_path, **changes), 45)  # in the third epoch
    rest = train(make_run(tmp_path, **changes))
    assert rest.epochs == 3 and rest.stopped.startswith(
        "stopped early after epoch 3: no better accuracy by more"
    )
    again = train(make_run(tmp_path, **changes))
    assert (again.epochs, again.first_step_at, again.stopped) == (3, 0, rest.stopped)
    assert train(make_run(tmp_path, **{**changes, "patience": 3})).epochs == 4
