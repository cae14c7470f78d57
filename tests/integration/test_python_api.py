"""Jobs called from Python."""

from __future__ import annotations

import re

import ray

from cvdist import config as configs
from cvdist.features import maintenance
from cvdist.features import manifest as manifests
from cvdist.jobs import preprocess
from cvdist.jobs.preprocess import table
from cvdist.storage import Folder
from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import ROOT


def test_the_lines_of_the_readme(tmp_path, monkeypatch):
    """As they stand in README.md, but for the number of epochs and where the files go."""
    text = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"^    from cvdist import recipes\n(?:    .*\n|\n(?=    ))+", text, re.M)
    code = re.sub(r"^    ", "", lines, flags=re.M)
    assert len(code.split("\n\n")) == 2 and "epochs=3" in code
    monkeypatch.setenv("CVDIST_STORAGE", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    names: dict = {}
    exec(code.replace("epochs=3", "epochs=1, batch_size=500, visualize=False, system_metrics=False"), names)
    result = names["result"]
    assert result.summary.epochs == 1 and result.summary.best.valid_total == 1000
    assert (tmp_path / result.name).is_dir() and result.run is not None


def test_an_extraction_in_this_process(weights, tmp_path):
    counts = {f"{part}/{name}": 3 for part in ("train", "valid") for name in "ab"}
    photos = pictures.write(tmp_path / "photos", counts)
    chosen = feature_caches.config(photos, tmp_path / "features", weights, tmp_path / "cache")
    config = configs.replace(feature_caches.extraction(chosen), runtime="inline")
    result = preprocess(config)
    assert result.built.computed == 12 and "computed  12 pictures" in table(result)
    assert "is whole: 4/4 shards, 12 pictures" in maintenance.check(chosen.features.uri)
    assert preprocess(config).built.computed == 0 and not ray.is_initialized()
    other = configs.replace(chosen, features=chosen.features.uri + "-2")
    feature_caches.extract(other)
    read = [manifests.read(Folder.open(uri, "")) for uri in (chosen.features.uri, other.features.uri)]
    assert [shard.raw_sha256 for shard in read[0].shards] == [shard.raw_sha256 for shard in read[1].shards]
