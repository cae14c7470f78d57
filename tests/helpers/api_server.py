"""A stand-in for Kubernetes' API server, for kubectl: it keeps what it is given, and checks nothing."""

from __future__ import annotations

import copy
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_KINDS = {
    "v1": {"ConfigMap": "configmaps", "Namespace": "namespaces", "Service": "services",
           "ServiceAccount": "serviceaccounts"},
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "ray.io/v1": {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"},
}  # fmt: skip


@dataclass
class ApiServer:
    """The objects by their paths, and the requests that changed something, as (method, path)."""

    url: str = ""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    writes: list[tuple[str, str]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """The status and the content that answer a request."""
        if method == "GET":
            found = _discovery(path) or self.objects.get(path)
            return (200, found) if found else (404, _status(404, "NotFound"))
        self.writes.append((method, path))
        if method == "POST":
            metadata = body["metadata"]
            if "name" not in metadata:
                metadata["name"] = f"{metadata['generateName']}{next(self._numbers):05}"
            path = f"{path}/{metadata['name']}"
            if path in self.objects:
                return 409, _status(409, "AlreadyExists")
            self.objects[path] = body
        elif method == "PATCH":
            self.objects[path] = _merge(self.objects[path], body)
        else:
            return 200, self.objects.pop(path)
        return 200, self.objects[path]


def _discovery(path: str) -> dict[str, Any] | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for group in (version.split("/")[0] for version in _KINDS if "/" in version):
            served = {"groupVersion": f"{group}/v1", "version": "v1"}
            groups.append({"name": group, "versions": [served], "preferredVersion": served})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in _KINDS:
        return None
    resources = [
        {"name": plural, "singularName": "", "namespaced": kind != "Namespace", "kind": kind,
         "verbs": ["create", "delete", "get", "list", "patch"]}
        for kind, plural in _KINDS[version].items()
    ]  # fmt: skip
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _status(code: int, reason: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code,
            "message": reason}  # fmt: skip


def _merge(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict) or not isinstance(old, dict):
        return patch
    merged = copy.copy(old)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(old.get(key), value)
    return merged


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """Serve on loopback while the context lasts."""
    kept = ApiServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def respond(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            status, content = kept.answer(self.command, self.path.partition("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = respond

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        kept.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield kept
        finally:
            server.shutdown()
            serving.join()
