"""Which networks a comparison takes, which it calls tied, and what it says before the long work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cvdist import config as configs
from cvdist.config import NetworksConfig, ProbeConfig
from cvdist.errors import UserError
from cvdist.jobs import cli
from cvdist.jobs.probe import ProbedNetwork, compare, file_of, network_of, probe, table
from cvdist.models.library import TIMM
from tests.helpers import pictures
from tests.helpers.jobs import user_error


def settings(root, **changes):
    return configs.replace(
        ProbeConfig(), data=str(root / "pictures"), storage=str(root / "runs"), runtime="inline", **changes
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    pictures.write(root / "pictures", pictures.FOUR)
    return root


def probed(name, wrong, gflop, solved=True, left_out=90):
    """A network that has all of 100 validation pictures right but for those in `wrong`."""
    right = torch.ones(100, dtype=torch.bool)
    right[list(wrong)] = False
    chosen = configs.replace(ProbeConfig(), data="/d")
    network = network_of(chosen, name, configs.BackboneConfig(name=name))
    best = right if solved else None
    return ProbedNetwork(network, right, best, left_out, 100, "", 50.0, 2e3, 10**7, gflop)


def compared(*networks):
    return compare(configs.replace(ProbeConfig(), data="/d"), networks, "a CPU", 1.0)


def test_of_networks_within_chance_the_cheapest_is_chosen():
    large, small = probed("vgg16", range(3), 15.5), probed("mobilenet_v2", range(2, 7), 0.3)
    poor = probed("squeezenet1_1", range(40, 60), 0.2)
    result = compared(poor, small, large)
    assert [one.name for one in result.networks] == ["vgg16", "mobilenet_v2", "squeezenet1_1"]
    # 2 pictures only one of them has right, 4 the other: 2 * 22 / 64.
    assert result.comparisons[0].p == pytest.approx(0.6875)
    assert [pair.tied for pair in result.comparisons] == [True, False, False]
    assert result.chosen.name == "mobilenet_v2"
    shown = table(result)
    assert "tied with vgg16, within chance by McNemar's exact test: mobilenet_v2 (p = 0.69)" in shown
    assert "mobilenet_v2 takes the fewest operations of these" in shown
    assert "97.00% (97/100)" in shown and "91.55-98.97%" in shown and "90.00% (90/100)" in shown
    assert f"next: {cli.command('train')} transfer-features --model mobilenet_v2 " in shown


def test_the_best_is_chosen_if_the_others_are_worse():
    result = compared(probed("resnet50", range(12), 4.1), probed("vit_b_16", [99], 17.6))
    assert result.chosen.name == "vit_b_16"
    assert "vit_b_16 is better than the others" in table(result)
    assert "tied" not in table(result)


def test_classifiers_of_two_kinds_are_not_compared():
    solved = dataclasses.replace(probed("a", range(20), 1), logistic=torch.ones(100, dtype=torch.bool))
    result = compared(solved, probed("b", range(20), 2, solved=False))
    assert result.networks[0].name == "a" and result.networks[0].correct == 100
    assert result.comparisons[0].p == 1.0
    assert "  -  " in table(result)


def test_pictures_that_changed_meanwhile_are_noticed():
    with pytest.raises(UserError, match="have changed in the meantime"):
        compared(probed("a", [], 1), dataclasses.replace(probed("b", [], 1), pictures="others"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "--models is needed: networks separated by commas"),
        ("resnet18,resnet18", "--models names resnet18 twice"),
        ("resnet18, resnet5", "--models resnet5: unknown model 'resnet5': did you mean"),
        ("resnet18:no.pth", "--models resnet18-no: --weights no.pth: there is no such file"),
        ("scratch-cnn:DEFAULT", "--models scratch-cnn-DEFAULT: --weights is for models that go on from"),
    ],
)
def test_a_network_that_cannot_be_used_is_one_line_before_the_work(photos, names, message):
    assert user_error(probe, settings(photos, models=names)).startswith(message)
    assert not (photos / "runs").exists()


def test_every_network_that_cannot_be_used_is_named(photos):
    with pytest.raises(UserError, match=r"^--models restnet50: .*; --models vgg61: "):
        probe(settings(photos, models="restnet50,vgg61"))


def test_files_of_weights_belong_to_the_network_with_the_longest_name():
    names = (
        "vgg16-397923af.pth",
        "vgg16_bn.pth",
        "timm-resnet18.safetensors",
        "resnet50.txt",
        "old/resnet50.pth",
    )
    files = dict.fromkeys(names, 1)
    assert file_of("vgg16", files, "/w/") == "/w/vgg16-397923af.pth"
    assert file_of("vgg16_bn", files, "/w") == "/w/vgg16_bn.pth"
    assert file_of(f"{TIMM}resnet18", files, "/w") == "/w/timm-resnet18.safetensors"
    assert file_of("vgg16", files, "") == "DEFAULT"
    with pytest.raises(UserError, match=r"has no file resnet50\.pth or the like"):
        file_of("resnet50", files, "/w")
    with pytest.raises(UserError, match=r"has vgg16-397923af\.pth, vgg16\.pt: name one"):
        file_of("vgg16", {**files, "vgg16.pt": 1}, "/w")


def test_one_folder_name_holds_the_caches_of_one_set_of_pictures():
    places = {configs.replace(ProbeConfig(), data=uri, storage="/s").caches for uri in ("/a/pets", "/b/pets")}
    assert len(places) == 2 and all(place.startswith("/s/features/pets-") for place in places)
    assert configs.replace(ProbeConfig(), data="/a", features="s3://b/c/").caches == "s3://b/c"
    assert NetworksConfig().finalists == 3
