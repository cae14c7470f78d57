"""The documents' pictures of a run: `python docs/screenshots.py [RUN]`.

MLflow's pages are taken in a real browser, figures from the run's artifacts. RUN is the id or the name of a
finished run of the recipe `digits-cnn` in the store of `--storage` (or $CVDIST_STORAGE, or ./runs), by default
the newest. Needs Chromium (`apt-get install chromium`) and what `make test` installs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image
from playwright.sync_api import expect

from tests.helpers.browser import CHROMIUM, RunPages, browser, mlflow_server

PICTURES = Path(__file__).resolve().parent / "pictures"
MOST_BYTES = 300_000
# The figures that documents show, by their paths in a run.
FIGURES = {
    "activations.png": "activations/conv1.png",
    "forming.gif": "filters/forming.gif",
    "most_wrong.png": "most_wrong.png",
    "top_activations.png": "top_activations/conv2.png",
}


def main() -> int:
    """Start a server on the run's store, look at the run, keep what is seen and some of its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", default="", help="id or name; default: the newest finished run")
    parser.add_argument("--storage", default=os.environ.get("CVDIST_STORAGE", "runs"))
    parser.add_argument("--output", type=Path, default=PICTURES)
    chosen = parser.parse_args()
    database = Path(chosen.storage).resolve() / "mlflow.db"
    if not CHROMIUM:
        print("error: no Chromium: apt-get install chromium, or name it by CVDIST_CHROMIUM", file=sys.stderr)
        return 2
    if not database.exists():
        print(f"error: there is no {database}: make demo makes it", file=sys.stderr)
        return 2
    from mlflow.artifacts import download_artifacts

    store = f"sqlite:///{database}"
    experiment_id, run_id, name = _find(store, chosen.run)
    with (
        tempfile.TemporaryDirectory(prefix="cvdist-screenshots-") as folder,
        mlflow_server(Path(folder), store) as uri,
        browser() as chromium,
    ):
        pages = RunPages(chromium, uri, experiment_id, run_id)
        pages.page.set_viewport_size({"width": 1400, "height": 1080})

        charts = pages.charts("^(train|valid)/(loss|accuracy)$")
        expect(charts.get_by_text(f"{name} (valid/loss)")).to_be_visible()
        charts.screenshot(path=chosen.output / "run.png")

        pages.page.set_viewport_size({"width": 1500, "height": 1720})
        report = pages.report()
        expect(report.locator(".score")).to_be_visible()
        pages.page.screenshot(path=chosen.output / "report.png")
        figures = download_artifacts(
            run_id=run_id, artifact_path="figures", tracking_uri=store, dst_path=folder
        )
        for picture, figure in FIGURES.items():
            shutil.copyfile(Path(figures) / figure, chosen.output / picture)
    for picture in ("run.png", "report.png", *FIGURES):
        path = chosen.output / picture
        if picture not in FIGURES:
            _make_small(path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB, of the run {name}")
    return 0


def _find(store: str, name: str) -> tuple[str, str, str]:
    """Return the ids of the run's experiment and of the run, and the run's name."""
    from cvdist import config as configs
    from cvdist.tracking.find import find_run
    from cvdist.tracking.run import mlflow_client

    client = mlflow_client(store)
    if name:
        run = client.get_run(find_run(configs.replace(configs.TrainConfig(), tracking_uri=store), name).run_id)
    else:
        experiments = [found.experiment_id for found in client.search_experiments()]
        (run,) = client.search_runs(experiments, "attributes.status = 'FINISHED'", max_results=1)
    return run.info.experiment_id, run.info.run_id, str(run.info.run_name)


def _make_small(path: Path) -> None:
    """256 colors do for a page of text and charts, where the picture would be large with all."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if path.stat().st_size > MOST_BYTES / 2:
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
