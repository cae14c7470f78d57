"""What preflight computes of a job's traffic."""

from __future__ import annotations

from cvdist import recipes
from cvdist.jobs.preflight import summed_bytes
from cvdist.training.memory import trained_parameters


def test_preflight_says_what_a_split_head_sums():
    vgg = recipes.find("dogs-cats-vgg16")
    assert summed_bytes(vgg, 4) == 64 * 4096 * 4
    assert summed_bytes(recipes.find("dogs-cats-vgg16-probe"), 4) == 0


def test_preflight_counts_what_each_step_averages():
    usual = trained_parameters(recipes.find("dogs-cats-vgg16"), 10)
    assert usual == (25088 * 4096 + 4096) + (4096 * 4096 + 4096) + (4096 * 10 + 10)
    assert trained_parameters(recipes.find("dogs-cats-vgg16-mlp"), 10) == (512 * 256 + 256) + (256 * 10 + 10)
    assert trained_parameters(recipes.find("dogs-cats-vgg16-probe"), 10) == 25088 * 10 + 10
