"""Groups of settings, the names of their flags, and what copies and checks make of them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from cvdist import config as configs
from cvdist import recipes
from cvdist.errors import UserError
from cvdist.jobs import cli
from cvdist.sweep import space
from tests.helpers.jobs import user_error

KINDS = sorted({job.settings for job in cli.JOBS.values()}, key=lambda kind: kind.__name__)
CONFIG = Path(configs.__file__).parent


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_json(kind):
    settings = kind()
    assert configs.from_dict(kind, json.loads(json.dumps(configs.to_dict(settings)))) == settings


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_repeats_the_name_of_its_group(kind):
    """`config.data.uri`, not `config.data.data` or `config.tracking.tracking_uri`."""
    repeats = [
        f"{one.group}.{one.field}"
        for one in configs.settings_of(kind)
        if one.field == one.group or one.field.startswith(f"{one.group}_")
    ]
    assert not repeats


def test_changes_go_by_the_names_of_flags_and_their_aliases():
    config = configs.replace(
        recipes.find("digits-cnn"), data="pictures", model="vgg16", optimizer="adamw", parallel="data",
        runtime="inline", tracking="none", tracking_uri="http://x", keep_checkpoints=3, seed=4, name="n",
        workers=5,
    )  # fmt: skip
    assert (config.data.uri, config.model.name, config.optimizer.name) == ("pictures", "vgg16", "adamw")
    assert (config.parallel.mode, config.runtime.launcher, config.runtime.num_workers) == ("data", "inline", 5)
    assert (config.tracking.mode, config.tracking.uri, config.checkpoint.keep) == ("none", "http://x", 3)
    assert (config.run.seed, config.run.name, config.recipe) == (4, "n", "digits-cnn")
    with pytest.raises(TypeError, match="no such settings: uri, epoch"):
        configs.replace(config, uri="x", epoch=3)


def test_an_extraction_takes_from_a_recipe_what_it_uses():
    recipe = recipes.dogs_cats_vgg16_augmented(data="d", features="f", views=3, precision="tf32", image_size=64)
    config = configs.PreprocessConfig.of(recipe)
    assert config.data == configs.part_of(configs.PicturesConfig, recipe.data)
    assert config.augmentation == configs.AugmentationConfig(horizontal_flip=0.5, rotation=10.0)
    assert (config.features.uri, config.features.views, config.compute.precision) == ("f", 3, "tf32")
    assert (config.model.name, config.model.weights) == ("vgg16", "IMAGENET1K_V1")
    configs.check_preprocess(config)
    for missing in ("data", "features"):
        with pytest.raises(UserError, match=f"^--{missing} is needed"):
            configs.check_preprocess(configs.replace(config, **{missing: ""}))


def test_a_sweep_is_a_training_and_its_search():
    job = configs.SweepJobConfig.of(recipes.digits_cnn(epochs=7), configs.SweepConfig(trials=3))
    assert job.train == recipes.digits_cnn(epochs=7) and type(job.train) is configs.TrainConfig
    configs.check_sweep(job)
    with pytest.raises(UserError, match="--runtime inline: sweeps run on Ray"):
        configs.check_sweep(configs.replace(job, runtime="inline"))
    changed = configs.replace(job, trials=4, lr=0.5)
    assert (changed.sweep.trials, changed.train.optimizer.lr) == (4, 0.5)


def test_what_can_be_searched_goes_by_flags():
    found = {
        dimension.name
        for dimension in space.parse_search(("optimizer=sgd,adamw", "lr=1:2"), recipes.digits_cnn())
    }
    assert found == {"optimizer", "lr"}
    with pytest.raises(UserError, match="name can't be searched"):
        space.parse_search(("name=a,b",), recipes.digits_cnn())


def test_recipes_take_overrides():
    assert recipes.mnist_cnn(epochs=3) == recipes.find("mnist-cnn", epochs=3)
    assert recipes.mnist_cnn(epochs=3).loop.epochs == 3
    assert recipes.dogs_cats_vgg16_mlp(lr=1.0).recipe == "dogs-cats-vgg16-mlp"
    with pytest.raises(TypeError, match="no such settings: epoch"):
        recipes.mnist_cnn(epoch=3)


def test_each_default_is_written_once():
    """A default that another group has under the same flag is that group's: `device = RuntimeConfig.device`."""
    literal, seen = [], {}
    for path in sorted(CONFIG.glob("*.py")):
        for group in [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]:
            for node in group.body:
                if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Constant):
                    continue
                key = (node.target.id, node.value.value)
                if node.value.value not in ("", 0, False) and key in seen:
                    literal.append(
                        f"{group.name}.{node.target.id} and {seen[key]} are both {node.value.value!r}"
                    )
                seen[key] = f"{group.name}.{node.target.id}"
    assert not literal


@pytest.mark.parametrize(
    ("kind", "flag", "value", "message"),
    [
        (configs.PredictConfig, "max_bad_fraction", 2.0, "--max-bad-fraction is 2.0: it takes a number"),
        (configs.EvaluateConfig, "tracking_timeout", 0.0, "--tracking-timeout is 0.0: it takes 0.1 or more"),
        (configs.PreprocessConfig, "extractors", -1, "--extractors is -1: it takes 0 or more"),
        (configs.TrainConfig, "checkpoint_timeout", 0.5, "--checkpoint-timeout is 0.5: it takes 1 or more"),
        (configs.TrainConfig, "tracking_drain_timeout", -1.0, "--tracking-drain-timeout is -1.0: it takes 0"),
    ],
)
def test_bounds_name_the_flag(kind, flag, value, message):
    assert user_error(configs.check_groups, configs.replace(kind(), **{flag: value})).startswith(message)
