"""Several views of a picture in the cache."""

from __future__ import annotations

from itertools import pairwise

import torch

from benchmarks import made_up_features
from cvdist import config as configs
from cvdist import models
from tests.helpers.feature_caches import extract, opened, refusal

# ------------------------------------------------------------------------------------------------------- views


def test_views_are_the_augmented_pictures(chosen):
    chosen = configs.replace(chosen, horizontal_flip=1.0, views=2, features_dtype="float32")
    built, _ = extract(chosen)
    shards = {s.views for s in built.manifest.shards}
    assert shards == {2, 1}  # one for those to validate on
    features = made_up_features.everything(built.manifest, chosen.features.uri)
    frozen, normal = (
        models.build_frozen(chosen.model, chosen.data.image_size).module,
        models.preprocessing(chosen.model),
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (normal.mean, normal.std))
    loader = opened(chosen)
    pixels, _ = loader.pictures("train", range(13))
    for path, picture in zip(loader.names("train", range(13)), pixels, strict=True):
        plain = (picture[None] / 255 - mean) / std
        torch.testing.assert_close(features[path][:1], frozen(plain), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[path][1:], frozen(plain.flip(-1)), rtol=1e-4, atol=1e-5)


def test_views_and_recipes_have_to_agree(chosen):
    flips = configs.replace(chosen, horizontal_flip=0.5, rotation=10.0)
    built, _ = extract(flips)
    assert built.manifest.fingerprint.views == 4  # the default of a recipe that augments
    assert "another augmentation (horizontal_flip 0.5 rotation 10)" in refusal(flips, rotation=5.0)
    assert "than this run asks for (horizontal_flip 0.5 rotation 10 auto_augment ra)" in refusal(
        flips, auto_augment="ra"
    )
    assert "4 views of each training picture" in opened(flips).note
    assert "4 views of each training picture" in opened(chosen).note  # a recipe without takes what there is
    assert "views of each" not in opened(configs.replace(chosen, views=1)).note  # the pictures as they are


def test_views_differ_without_naming_an_augmentation(chosen):
    named = configs.replace(chosen, horizontal_flip=0.5, rotation=10.0, views=3)
    one = extract(configs.replace(chosen, views=3))[0].manifest
    assert one.fingerprint == extract(named)[0].manifest.fingerprint
    assert one.fingerprint.views == 3 and one.fingerprint.augmentation is not None
    features = made_up_features.everything(one, chosen.features.uri)
    assert all(not torch.equal(*pair) for f in features.values() if len(f) > 1 for pair in pairwise(f))


def test_views_do_not_depend_on_how_the_data_is_cut(chosen):
    """The same picture in another shard of another extraction has the same views."""
    kinds = {"rotation": 10.0, "auto_augment": "ta_wide", "random_erase": 0.5}
    flips = configs.replace(chosen, **kinds, views=3, features_dtype="float32")
    one = extract(flips)[0].manifest
    other = configs.replace(flips, shard_size=7, features=flips.features.uri + "2")
    two = extract(other)[0].manifest
    mine = made_up_features.everything(one, flips.features.uri)
    theirs = made_up_features.everything(two, other.features.uri)
    assert mine.keys() == theirs.keys()
    for path, features in mine.items():
        torch.testing.assert_close(features, theirs[path], rtol=1e-4, atol=1e-5)
        views = [features[i] for i in range(len(features))]
        assert all(not torch.equal(a, b) for a, b in pairwise(views))
