"""The settings of one extraction of features."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cvdist.config.groups import (
    AugmentationConfig,
    BackboneConfig,
    ComputeConfig,
    ExtractionConfig,
    ExtractorsConfig,
    PicturesConfig,
)
from cvdist.config.places import require_outside
from cvdist.config.settings import check_groups, part_of
from cvdist.config.train import TrainConfig
from cvdist.errors import UserError


@dataclass(frozen=True)
class PreprocessConfig:
    """One job of `jobs/preprocess.py`. `recipe` is the name of the recipe that it began from."""

    recipe: str = ""
    data: PicturesConfig = field(default_factory=PicturesConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    features: ExtractionConfig = field(default_factory=ExtractionConfig)
    model: BackboneConfig = field(default_factory=BackboneConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    runtime: ExtractorsConfig = field(default_factory=ExtractorsConfig)

    @classmethod
    def of(cls, recipe: TrainConfig) -> PreprocessConfig:
        """Build the settings from a recipe's pictures, network and cache, with defaults for the rest."""
        return cls(
            recipe=recipe.recipe,
            data=part_of(PicturesConfig, recipe.data),
            augmentation=part_of(AugmentationConfig, recipe.augmentation),
            features=ExtractionConfig(uri=recipe.features.uri, views=recipe.features.views),
            model=replace(part_of(BackboneConfig, recipe.model), features_at=recipe.model.cut),
            compute=part_of(ComputeConfig, recipe.loop),
        )


def check_preprocess(config: PreprocessConfig) -> None:
    """Refuse settings that no extraction can work with, before anything is started.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    check_groups(config)
    config.augmentation.require_crops()
    if not config.data.uri:
        raise UserError("--data is needed: the folder or URI of the pictures")
    if not config.features.uri:
        raise UserError("--features is needed: the folder or URI that the features are written to")
    require_outside(config.data.root or config.data.uri, features=config.features.uri)
