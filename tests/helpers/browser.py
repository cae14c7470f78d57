"""MLflow's pages as a person sees them: a real server, and Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, FrameLocator, Page, Request, expect, sync_playwright

from k8s.services import answers, free_port
from tests.helpers.waiting import kill_with_children, wait_until

# Of one element to appear. MLflow's server reads its code again for the first page.
SECONDS = 180
CHROMIUM = os.environ.get("CVDIST_CHROMIUM") or shutil.which("chromium") or ""

_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
# As after a first visit: the panel of MLflow's assistant is closed.
_VISITED = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
# The charts of training, not those of chats.
_TRAINING = "?workflowType=machine_learning"


@contextmanager
def mlflow_server(folder: Path, store: str, *arguments: str | Path) -> Iterator[str]:
    """A server on loopback with the backend store `store`; yields its address. Its log is in `folder`."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--backend-store-uri", store]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", *map(str, arguments)]
    with (folder / "mlflow-server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={
                **os.environ,
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "DO_NOT_TRACK": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that nobody here needs
            },
        )
    try:
        wait_until(lambda: server.poll() is not None or answers(f"{uri}/health"), "the MLflow server answers")
        assert server.poll() is None, (folder / "mlflow-server.log").read_text()
        yield uri
    finally:
        kill_with_children(server)


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, headless."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=list(_FLAGS), timeout=SECONDS * 1000
        )
        try:
            yield started
        finally:
            with contextlib.suppress(Error):
                started.close()


class RunPages:
    """A run's pages in MLflow. Requests to other machines are refused, and noted in `elsewhere`."""

    def __init__(self, browser: Browser, uri: str, experiment_id: str, run_id: str) -> None:
        """Of the server at `uri`."""
        self._uri, self._run = uri, f"{uri}/#/experiments/{experiment_id}/runs/{run_id}"
        self.elsewhere: list[str] = []
        context = browser.new_context(viewport={"width": 1400, "height": 860})
        context.set_default_timeout(SECONDS * 1000)
        context.add_init_script(_VISITED)
        context.on("request", self._note)
        context.route(lambda address: not self._is_here(address), lambda route: route.abort())
        self.page: Page = context.new_page()
        expect.set_options(timeout=SECONDS * 1000)

    def overview(self) -> Page:
        """The run's first page."""
        return self._open("")

    def charts(self, names: str) -> Page:
        """The charts of the metrics that the regular expression `names` finds, all drawn."""
        page = self._open("/model-metrics")
        page.get_by_placeholder("Search metric charts").fill(names)
        expect(page.locator(".js-plotly-plot .scatterlayer path.js-line").first).to_be_visible()
        return page

    def artifact(self, path: str) -> Page:
        """The artifacts, with that at `path` chosen."""
        return self._open(f"/artifacts/{path}")

    def report(self) -> FrameLocator:
        """`report.html`, in the frame that MLflow shows it in."""
        return self.artifact("report.html").frame_locator("iframe.mlflow-html-iframe")

    def _open(self, path: str) -> Page:
        self.page.goto("about:blank")  # or only the address's fragment would change
        self.page.goto(f"{self._run}{path}{_TRAINING}")
        return self.page

    def _is_here(self, address: str) -> bool:
        return address.startswith((f"{self._uri}/", "blob:", "data:", "about:"))

    def _note(self, request: Request) -> None:
        if not self._is_here(request.url):
            self.elsewhere.append(request.url)
