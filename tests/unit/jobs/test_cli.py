"""The command line as a person meets it."""

from __future__ import annotations

import json

import pytest

from cvdist import config as configs
from cvdist import log, recipes
from cvdist.config import RuntimeConfig
from cvdist.errors import UserError
from cvdist.jobs import cli
from cvdist.runtime import processes
from tests.helpers.jobs import user_error


def parse(*words):
    return cli.parse("train", words)


def test_flags_override_a_recipe():
    config = parse(
        "mnist-cnn", "--epochs", "3", "--lr", "0.5", "--compile", "--no-channels-last", "--name", "x"
    )
    assert (config.recipe, config.loop.epochs, config.optimizer.lr) == ("mnist-cnn", 3, 0.5)
    assert config.loop.compile == "default" and not config.loop.channels_last
    assert config.optimizer.momentum == 0.5


def test_the_books_settings():
    config = recipes.find("mnist-cnn")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ("sgd", 0.01, 0.5)
    assert (config.loop.batch_size, config.loop.epochs, config.model.dropout) == (32, 20, 0.5)


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_valid_and_survive_json(name):
    config = recipes.find(name)
    place = "features" if config.loop.fit == "logistic" else "data"
    configs.check(configs.replace(config, **{place: "somewhere"}))
    assert configs.from_dict(configs.TrainConfig, json.loads(json.dumps(configs.to_dict(config)))) == config


def test_field_names_are_unique_over_groups():
    for job in cli.JOBS.values():
        names = [word for one in configs.settings_of(job.settings) for word in one.words]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit-cnn"], "unknown recipe 'digit-cnn': did you mean digits-cnn"),
        (["--epochs", "3"], "the first argument is a recipe, not --epochs: one of mnist-cnn"),
        (["mnist-cnn", "--learning-rat", "1"], "unknown flag --learning-rat: "),
        (["mnist-cnn", "--epoch", "1"], "unknown flag --epoch: did you mean --epochs"),
        (["mnist-cnn", "--epochs", "three"], "--epochs: invalid literal for int"),
        (["mnist-cnn", "--dataset", "cifar"], "invalid choice 'cifar' for argument '--dataset'"),
        (["mnist-cnn", "stray"], "stray"),
    ],
)
def test_mistakes_are_one_line(words, message):
    assert message in user_error(parse, *words)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "--epochs is 0: it takes 1 or more"),
        ("batch_size", -4, "--batch-size is -4"),
        ("dropout", 1.0, r"--dropout is 1.0: it takes a number in [0, 1)"),
        ("lr", float("nan"), "--lr is nan: it takes a finite number"),
        ("random_resized_crop", 0.0, "--random-resized-crop is 0.0: it takes a number in (0, 1]"),
        ("max_bad_fraction", 1.5, "--max-bad-fraction is 1.5: it takes a number in [0, 1]"),
        ("image_size", 4, "--image-size is 4: it takes 8 or more, or 0"),
        ("trainable_stages", -1, "--trainable-stages is -1: it takes all, or 0 or more"),
        ("dataset", "images", "--data is needed: the folder or URI of the pictures, with a folder for each"),
        ("valid_fraction", 1.0, "--valid-fraction is 1.0"),
        ("name", "../up", "--name '../up'"),
    ],
)
def test_impossible_values_name_the_flag(field, value, message):
    changed = configs.replace(recipes.find("mnist-cnn"), **{field: value})
    assert message in user_error(configs.check, changed)


def test_proportions_of_crops_that_nobody_takes_are_refused():
    train = recipes.find("dogs-cats-vgg16-features", data="d", features="f", crop_ratio=2.0)
    for check, config in (
        (configs.check, train),
        (configs.check_preprocess, configs.PreprocessConfig.of(train)),
    ):
        with pytest.raises(UserError, match=r"^--crop-ratio 2 .* set --random-resized-crop"):
            check(config)
        check(configs.replace(config, random_resized_crop=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixup_alpha": 0.2, "dataset": "images", "features": "f"},
            r"--mixup-alpha mixes .* train from pictures",
        ),
        (
            {"cutmix_alpha": 1.0, "batch_size": 1},
            "--cutmix-alpha mixes the pictures of a batch .* --batch-size 1",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        configs.check(configs.replace(recipes.find("mnist-cnn"), **changes))


def test_without_arguments_a_job_lists_the_recipes(capsys):
    for name in ("train", "preprocess", "sweep", "preflight"):
        assert cli.parse(name, []) is None
        assert "dogs-cats-vgg16-features" in capsys.readouterr().out


def test_workers_are_a_number_or_a_range():
    for word, expected in (("3", (3, 3)), ("2:8", (2, 8))):
        config = cli.parse("train", ["digits-cnn", "--num-workers", word])
        configs.check(config)
        assert config.runtime.worker_range == expected
    for word in ("8:2", "0", "some", "2:", "-1"):
        with pytest.raises(UserError, match=r"^--num-workers is"):
            configs.check(configs.replace(config, workers=word))


def test_workers_do_not_give_up_on_one_that_waits_for_its_data():
    config = cli.parse("train", ["digits-cnn", "--data-timeout", "600"])
    with pytest.raises(UserError, match=r"--step-timeout 150 is below --data-timeout 600"):
        configs.check(config)


@pytest.mark.parametrize(
    ("launcher", "rank", "said"),
    [("torchrun", "0", "error: no MNIST\n"), ("torchrun", "1", ""), ("inline", "1", "error: no MNIST\n")],
)
def test_a_mistake_that_all_workers_find_is_said_by_the_first(monkeypatch, capsys, launcher, rank, said):
    """Where there are several: inline is one process, whatever the environment says."""

    def job(_):
        with processes.init_distributed(RuntimeConfig(launcher=launcher, device="cpu")) as ranks:
            assert (ranks.rank, ranks.world_size) == ((0, 1) if launcher == "inline" else (int(rank), 1))
            raise UserError("no MNIST", on_all_workers=True)

    monkeypatch.setattr(log, "setup", lambda **_: None)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2" if launcher == "inline" else "1")
    assert cli.main(job, []) == 2 and capsys.readouterr().err == said
