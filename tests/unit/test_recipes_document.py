"""docs/recipes.md names flags that there are, and as missing only flags that there are not."""

from __future__ import annotations

import re

from cvdist.jobs import cli
from tests.helpers.jobs import ROOT

FLAGS = {word for job in cli.JOBS.values() for one in job.flags() for word in one.words}


def tables():
    """The rows of cells of each section, without the heads, by the section's title."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        yield section.partition("\n")[0], rows[2:]


def flags_of(cell):
    return re.findall(r"--[a-z][a-z-]+", cell)


def test_flags_of_ours_exist_and_what_is_not_here_is_not():
    found = dict(tables())
    ours = [flag for title in ("From other training scripts", "Only here") for row in found[title]
            for flag in flags_of(row[-1])]  # fmt: skip
    assert len(ours) > 50 and set(ours) <= FLAGS, set(ours) - FLAGS
    assert all(len(row) == 5 for row in found["From other training scripts"])
    missing = {flag for row in found["Not here"] for cell in row[1:] for flag in flags_of(cell)}
    assert len(missing) > 10 and not (missing - {"--opt"}) & FLAGS


def test_the_command_of_the_same_recipe_is_understood():
    text = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ")
    (words,) = re.findall(r"python jobs/train\.py (transfer .*)", text)
    config = cli.parse("train", words.split())
    assert (config.loop.batch_size, config.optimizer.lr_step_size, config.data.resize) == (
        256,
        30,
        "crop:256:bilinear",
    )
