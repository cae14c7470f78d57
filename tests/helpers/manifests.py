"""Kubernetes manifests, as kustomize renders them, and what can be wrong with them."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cvdist import config as configs
from cvdist.config import EvaluateConfig, PreprocessConfig, TrainConfig
from cvdist.errors import UserError
from cvdist.jobs import cli
from tests.helpers.jobs import ROOT

Object = dict[str, Any]

OVERLAYS = sorted(path.parent.name for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
KUBERNETES = ("1.29", "1.33", kubernetes_validate.latest_version())
# What KubeRay puts into Ray's containers by itself, and a name that it would give an attempt's cluster.
FROM_KUBERAY = {"RAY_CLUSTER_NAME": "nightly-29400000-abcde"}
_RAY = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayCronJob": ("jobTemplate", "rayClusterSpec")}


@functools.cache
def _kustomize(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: nothing renders the manifests")
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path) -> list[Object]:
    """The objects that kustomize makes of a folder."""
    return list(yaml.load_all(_kustomize(folder), yaml.CSafeLoader))


def applied(overlay: str, root: Path = ROOT / "k8s") -> list[Object]:
    """The objects of an overlay, which stand."""
    return build(root / "overlays" / overlay)


def render(overlay: str, root: Path = ROOT / "k8s") -> list[Object]:
    """The objects of an overlay, and its jobs."""
    made = [o for o in build(root / "jobs" / overlay) if o["kind"] in ("RayJob", "RayCronJob")]
    return applied(overlay, root) + made


def name_of(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def ray_spec(thing: Object) -> Object:
    """The cluster's specification in a RayCluster, RayJob or RayCronJob."""
    return functools.reduce(lambda spec, key: spec[key], _RAY[thing["kind"]], thing["spec"])


def job_spec(thing: Object) -> Object:
    """The job's specification in a RayJob or RayCronJob."""
    spec: Object = thing["spec"]["jobTemplate"] if thing["kind"] == "RayCronJob" else thing["spec"]
    return spec


@dataclass(frozen=True)
class PodOf:
    """A pod that an object brings about, and how many of them. role: `head` or `worker` in Ray's objects."""

    owner: str
    role: str
    count: int
    pod: Object

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.pod["metadata"].get("labels", {})
        return labels

    @property
    def containers(self) -> list[Object]:
        spec = self.pod["spec"]
        return [*spec.get("initContainers", []), *spec["containers"]]


def pods(objects: list[Object]) -> Iterator[PodOf]:
    """The pods of all objects, with what KubeRay adds to its own."""
    for thing in objects:
        kind, name = thing["kind"], name_of(thing)
        if kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield PodOf(name, "", thing["spec"].get("replicas", 1), _pod(name, thing["spec"]["template"]))
        if kind not in _RAY:
            continue
        spec = ray_spec(thing)
        head = _pod(name, spec["headGroupSpec"]["template"])
        head["metadata"].setdefault("labels", {})["ray.io/node-type"] = "head"
        if spec.get("enableInTreeAutoscaling"):
            options = {
                k: v
                for k, v in spec["autoscalerOptions"].items()
                if k in ("resources", "securityContext", "volumeMounts", "env")
            }
            image = head["spec"]["containers"][0]["image"]
            head["spec"]["containers"].append({"name": "autoscaler", "image": image, **copy.deepcopy(options)})
        yield PodOf(name, "head", 1, head)
        for group in spec["workerGroupSpecs"]:
            worker = _pod(name, group["template"])
            worker["metadata"].setdefault("labels", {})["ray.io/node-type"] = "worker"
            yield PodOf(name, "worker", group["replicas"], worker)


def _pod(owner: str, template: Object) -> Object:
    template = copy.deepcopy(template)
    metadata = {**template.get("metadata", {}), "name": owner.split()[1], "namespace": "cvdist"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def problems(objects: list[Object]) -> list[str]:
    """All that is wrong with the objects of an overlay, but for the schemas."""
    return [
        problem
        for check in (_pod_problems, _reference_problems, _network_problems, _command_problems, _ray_problems)
        for problem in check(objects)
    ]


# ------------------------------------------------------------------------------------------------- schemas


def schema_problems(objects: list[Object], version: str) -> list[str]:
    """Objects and pods that Kubernetes' own schemas of `version` refuse, unknown fields included."""
    core = [(name_of(o), o) for o in objects if not o["apiVersion"].startswith("ray.io/")]
    # Under one name, many of them are the same.
    made = [
        (f"pod of {p.owner}", {**p.pod, "metadata": {**p.pod["metadata"], "name": "pod"}})
        for p in pods(objects)
    ]
    found = []
    for what, thing in core + made:
        if problem := _schema_problem(json.dumps(thing, sort_keys=True), version):
            found.append(f"{what}: {problem}")
    return found


@functools.cache
def _schema_problem(thing: str, version: str) -> str:
    try:
        kubernetes_validate.validate(json.loads(thing), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
    return ""


def definitions() -> dict[str, Object]:
    """KubeRay's own schemas by kind, from the folder that CVDIST_KUBERAY_CRDS names."""
    folder = os.environ.get("CVDIST_KUBERAY_CRDS")
    if not folder:
        pytest.skip("CVDIST_KUBERAY_CRDS is not set: no folder with KubeRay's definitions")
    return _definitions(folder)


@functools.cache
def _definitions(folder: str) -> dict[str, Object]:
    schemas = {}
    for path in Path(folder).glob("*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)
        (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
        schemas[definition["spec"]["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return schemas


def _strict(schema: Any) -> Any:
    """A definition's schema as JSON Schema: fields that it does not name are errors, as for `kubectl apply`."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items() if key not in ("format", "default")}
    if "properties" in schema:
        made["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if "default" in schema:
        made["default"] = schema["default"]
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def definition_problems(objects: list[Object]) -> list[str]:
    """KubeRay's objects that its definitions refuse."""
    found = []
    for thing in objects:
        if not thing["apiVersion"].startswith("ray.io/"):
            continue
        schema = definitions().get(thing["kind"])
        if schema is None or thing["apiVersion"] != "ray.io/v1":
            found.append(f"{name_of(thing)}: KubeRay has no such kind in {thing['apiVersion']}")
            continue
        known = {"apiVersion", "kind", "metadata", "spec"}
        validator = jsonschema.Draft202012Validator(
            {**schema, "properties": {k: v for k, v in schema["properties"].items() if k in known}}
        )
        found += [
            f"{name_of(thing)}: {'.'.join(map(str, e.path))}: {e.message[:200]}"
            for e in validator.iter_errors(
                {k: v for k, v in thing.items() if k != "metadata"} | {"metadata": {}}
            )
        ]
    return found


def with_defaults(thing: Object) -> Object:
    """A KubeRay object as the API server keeps it: with the defaults of its definition."""
    filled: Object = _fill(definitions()[thing["kind"]], copy.deepcopy(thing))
    return filled


def _fill(schema: Any, value: Any) -> Any:
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
            if key in value:
                value[key] = _fill(inner, value[key])
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        value = [_fill(schema["items"], item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------- pods

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


def quantity(text: str | int) -> Decimal:
    """A number with Kubernetes' units."""
    number, unit = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]
    return Decimal(number) * _UNITS[unit]


def restricted(pod: Object) -> Iterator[str]:
    """What Pod Security's `restricted` standard has against a pod (kubernetes.io, Pod Security Standards)."""
    spec = pod["spec"]
    whole = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", []):
        if kind := next((key for key in volume if key != "name" and key not in _VOLUMES), None):
            yield f"volume {volume['name']} is a {kind}"
    if whole.get("sysctls"):
        yield "sysctls"
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        own, called = container.get("securityContext", {}), f"container {container['name']}"
        if own.get("privileged"):
            yield f"{called} is privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{called} may escalate its privileges"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{called} keeps capabilities"
        if own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True:
            yield f"{called} may run as root"
        if own.get("runAsUser", whole.get("runAsUser", 1)) == 0:
            yield f"{called} runs as root"
        if own.get("seccompProfile", whole.get("seccompProfile", {})).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            yield f"{called} has no seccomp profile"
        if own.get("procMount", "Default") != "Default":
            yield f"{called} unmasks /proc"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield f"{called} takes a port of the host"


def _pod_problems(objects: list[Object]) -> Iterator[str]:
    for made in pods(objects):
        where, spec = f"pod of {made.owner} {made.role}".rstrip(), made.pod["spec"]
        yield from (f"{where}: restricted: {what}" for what in restricted(made.pod))
        names = [volume["name"] for volume in spec.get("volumes", [])]
        kind, name = made.owner.split()
        if kind == "StatefulSet":
            names += [c["metadata"]["name"] for c in find(objects, kind, name)["spec"]["volumeClaimTemplates"]]
        if len(set(names)) != len(names):
            yield f"{where}: two volumes of one name"
        used = {mount["name"] for container in made.containers for mount in container.get("volumeMounts", [])}
        yield from (f"{where}: volume {volume} is mounted nowhere" for volume in set(names) - used)
        for volume in spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{where}: volume {volume['name']} has no sizeLimit"
        for container in made.containers:
            yield from _container_problems(f"{where}: {container['name']}", container, set(names))
        for container in spec["containers"]:
            if (
                container["name"] != "autoscaler"
                and not {"livenessProbe", "readinessProbe"} <= container.keys()
            ):
                yield f"{where}: {container['name']} has no probes"
            yield from _probe_problems(f"{where}: {container['name']}", container)
        if made.role and "/dev/shm" not in _memory_backed(spec):
            yield f"{where}: /dev/shm is not in memory"
        limit = sum(
            _size(volume)
            for volume in spec.get("volumes", [])
            if volume.get("emptyDir", {}).get("medium") != "Memory"
        )
        have = sum(
            quantity(c["resources"]["limits"].get("ephemeral-storage", 0))
            for c in spec["containers"]
            if "resources" in c
        )
        if limit > have:
            yield f"{where}: its volumes take {limit / 2**30:.1f} GiB, above its limit of ephemeral-storage"


def _size(volume: Object) -> Decimal:
    return quantity(volume.get("emptyDir", {}).get("sizeLimit", 0))


def _memory_backed(spec: Object) -> set[str]:
    memory = {v["name"] for v in spec.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"}
    return {m["mountPath"] for m in spec["containers"][0].get("volumeMounts", []) if m["name"] in memory}


def _container_problems(where: str, container: Object, volumes: set[str]) -> Iterator[str]:
    if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
        yield f"{where}: its root file system is writable"
    mounts = container.get("volumeMounts", [])
    yield from (f"{where}: mounts {m['name']}, which is no volume" for m in mounts if m["name"] not in volumes)
    if len({mount["mountPath"] for mount in mounts}) != len(mounts):
        yield f"{where}: two mounts at one path"
    if "/tmp" not in {mount["mountPath"] for mount in mounts}:
        yield f"{where}: has no writable /tmp"
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for resource in ("cpu", "memory", "ephemeral-storage"):
        if resource not in requests or resource not in limits:
            yield f"{where}: no request or limit of {resource}"
    for resource, asked in requests.items():
        if resource in limits and quantity(asked) > quantity(limits[resource]):
            yield f"{where}: requests {asked} of {resource}, above its limit"
        if "/" in resource and asked != limits.get(resource):
            yield f"{where}: request and limit of {resource} differ"
    yield from (f"{where}: no request of {r}" for r in limits if "/" in r and r not in requests)


def _probe_problems(where: str, container: Object) -> Iterator[str]:
    named = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        port = container.get(probe, {}).get("httpGet", {}).get("port")
        if isinstance(port, str) and port not in named:
            yield f"{where}: {probe} asks port {port}, which is not among its ports"


# ---------------------------------------------------------------------------------------------- references


def documented_secrets() -> dict[str, set[str]]:
    """Secrets and their keys that docs/kubernetes.md makes: `kubectl create secret generic NAME ...`."""
    text = (ROOT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ")
    made = {}
    for name, arguments in re.findall(r"create secret generic (\S+)(.*)", text):
        made[name] = set(re.findall(r"--from-literal[= ]([\w.-]+)=", arguments))
    return made


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """What a container finds in its environment; of what comes from secrets, the names."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= find(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        values[variable["name"]] = variable.get("value", "secret")
    return values


def token_path(pod: Object, container: Object) -> str:
    """Where a volume gives a container a token for the API server; empty: nowhere."""
    tokens = {
        volume["name"]
        for volume in pod["spec"].get("volumes", [])
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
    }
    return next((m["mountPath"] for m in container.get("volumeMounts", []) if m["name"] in tokens), "")


def _reference_problems(objects: list[Object]) -> Iterator[str]:
    secrets = documented_secrets()
    maps = {o["metadata"]["name"]: set(o["data"]) for o in objects if o["kind"] == "ConfigMap"}
    accounts = {o["metadata"]["name"]: o for o in objects if o["kind"] == "ServiceAccount"}
    for thing in objects:
        if thing["kind"] == "Secret":
            yield f"{name_of(thing)}: secrets don't belong into manifests"
        if thing["kind"] != "Namespace" and thing["metadata"].get("namespace") != "cvdist":
            yield f"{name_of(thing)}: is not in the namespace"
    for made in pods(objects):
        where, spec = f"pod of {made.owner} {made.role}".rstrip(), made.pod["spec"]
        account = spec.get("serviceAccountName", "default")
        if account not in accounts:
            yield f"{where}: there is no service account {account}"
        elif accounts[account].get("automountServiceAccountToken") is not False:
            yield f"{where}: the account {account} gives each of its pods a token"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{where}: each of its containers gets a token for the API server"
        for container in made.containers:
            scales, path = container["name"] == "autoscaler", token_path(made.pod, container)
            if path != (WHERE_RAY_READS_ITS_TOKEN if scales else ""):
                yield f"{where}: {container['name']} {'needs' if scales else 'gets'} a token for the API server"
        if spec.get("enableServiceLinks") is not False:
            yield f"{where}: gets an environment variable for each port of each service"
        for container in made.containers:
            inside = f"{where}: {container['name']}"
            for source in container.get("envFrom", []):
                if source["configMapRef"]["name"] not in maps:
                    yield f"{inside}: there is no ConfigMap {source['configMapRef']['name']}"
            variables = [variable["name"] for variable in container.get("env", [])]
            set_twice = {name for name in variables if variables.count(name) > 1}
            yield from (f"{inside}: {name} is set twice" for name in set_twice)
            for variable in container.get("env", []):
                origin = variable.get("valueFrom", {})
                if secret := origin.get("secretKeyRef"):
                    if secret["key"] not in secrets.get(secret["name"], set()):
                        named = f"{secret['name']} with the key {secret['key']}"
                        yield f"{inside}: docs/kubernetes.md makes no secret {named}"
                elif re.search("PASSWORD|SECRET|TOKEN|KEY", variable["name"]):
                    yield f"{inside}: {variable['name']} is written into the manifest"
                if origin.get("configMapKeyRef") and origin["configMapKeyRef"]["key"] not in maps.get(
                    origin["configMapKeyRef"]["name"], set()
                ):
                    yield f"{inside}: no such key: {origin['configMapKeyRef']}"
            words = " ".join(map(str, [*container.get("command", []), *container.get("args", [])]))
            known = environment(objects, container) if set(_maps_of(container)) <= maps.keys() else {}
            for name in re.findall(r"\$[({]?([A-Z][A-Z_]+)", words):
                if name not in known:
                    yield f"{inside}: ${name} is not in its environment"


def _maps_of(container: Object) -> list[str]:
    return [source["configMapRef"]["name"] for source in container.get("envFrom", [])]


# ------------------------------------------------------------------------------------------------- network

# The labels of KubeRay's operator, 1.7.0, by the way of installing it.
OPERATORS = {
    "helm": {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
    "kustomize": {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
}
# Where Ray's autoscaler reads its token.
WHERE_RAY_READS_ITS_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
# Of API servers behind their Service: of clouds, of kubeadm and kind, of minikube, of MicroK8s.
API_SERVER_PORTS = {443, 6443, 8443, 16443}


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes `labels`."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    assert not selector.get("matchExpressions"), "not needed so far"
    return True


def may_connect(objects: list[Object], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod of the namespace reach another one. `OPERATORS` are elsewhere."""
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]

    def open_(direction: str, labels: dict[str, str], peer: dict[str, str]) -> bool:
        mine = [
            p for p in policies if direction.title() in p["policyTypes"] and matches(p["podSelector"], labels)
        ]
        key = "from" if direction == "ingress" else "to"
        for policy in mine:
            for rule in policy.get(direction, []):
                ports = rule.get("ports")
                if ports is not None and port not in [p["port"] for p in ports]:
                    continue
                for other in rule.get(key, []):  # rules for all the world are not meant for pods
                    here = "namespaceSelector" not in other and peer not in OPERATORS.values()
                    there = other.get("namespaceSelector") == {} and peer in OPERATORS.values()
                    if "podSelector" in other and (here or there) and matches(other["podSelector"], peer):
                        return True
        return not mine

    leaves = source in OPERATORS.values() or open_("egress", source, target)
    return leaves and open_("ingress", target, source)


def _may_ask_kubernetes(objects: list[Object], labels: dict[str, str]) -> bool:
    """Whether a pod reaches the API server, wherever that is, on the ports that it commonly has."""
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    rules = [rule for p in policies if matches(p["podSelector"], labels) for rule in p.get("egress", [])]
    return {p["port"] for rule in rules if "to" not in rule for p in rule["ports"]} >= API_SERVER_PORTS


def _network_problems(objects: list[Object]) -> Iterator[str]:
    made = list(pods(objects))
    services = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "Service"}
    behind: dict[str, list[PodOf]] = {}
    for name, service in services.items():
        behind[name] = [p for p in made if matches({"matchLabels": service["selector"]}, p.labels)]
        if not behind[name]:
            yield f"Service {name}: selects no pod"
        for port in service["ports"]:
            named = {
                p["name"]: p["containerPort"]
                for pod in behind[name]
                for c in pod.containers
                for p in c.get("ports", [])
            }
            if named.get(port["targetPort"], port["targetPort"]) != port["port"]:
                yield f"Service {name}: port {port['port']} leads nowhere: {port['targetPort']}"
        if service.get("type", "ClusterIP") != "ClusterIP":
            yield f"Service {name}: is reachable from outside"
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        for thing in (o for o in objects if o["kind"] == kind):
            selector = thing["spec"].get("podSelector", thing["spec"].get("selector"))
            if not any(matches(selector, pod.labels) for pod in made):
                yield f"{name_of(thing)}: selects no pod"
    for budget in (o for o in objects if o["kind"] == "PodDisruptionBudget"):
        taken = [pod for pod in made if pod.role and matches(budget["spec"]["selector"], pod.labels)]
        if taken and not isinstance(budget["spec"].get("minAvailable"), int):
            yield f"{name_of(budget)}: Kubernetes can't count KubeRay's pods: only a number as minAvailable"
    for pod in made:
        for container in pod.containers:
            values = environment(objects, container)
            for name, host, port in _addresses(values):
                called = f"pod of {pod.owner}: {container['name']}: {name}={host}:{port}"
                if host not in services:
                    yield f"{called}: there is no such service"
                elif port not in [p["port"] for p in services[host]["ports"]]:
                    yield f"{called}: the service has no such port"
                elif _uses(pod, name) and not all(
                    may_connect(objects, pod.labels, other.labels, port) for other in behind[host]
                ):
                    yield f"{called}: the network policies are in the way"
        scales = any(container["name"] == "autoscaler" for container in pod.containers)
        if scales and not _may_ask_kubernetes(objects, pod.labels):
            yield f"pod of {pod.owner}: can't scale: the network policies are in the way"
        for how, operator in OPERATORS.items():
            if pod.role == "head" and not may_connect(objects, operator, pod.labels, 8265):
                yield f"pod of {pod.owner}: KubeRay ({how}) can't submit jobs: the policies are in the way"


def _addresses(values: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """Hosts of the cluster in an environment: (variable, host, port)."""
    for name, value in values.items():
        if found := re.fullmatch(r"https?://([a-z0-9-]+):(\d+)", value):
            yield name, found[1], int(found[2])
    if "PGHOST" in values:
        yield "PGHOST", values["PGHOST"], int(values["PGPORT"])


def _uses(pod: PodOf, variable: str) -> bool:
    """The settings are the same for all; the MLflow server does not call itself."""
    return bool(pod.role) or variable != "MLFLOW_TRACKING_URI"


# ---------------------------------------------------------------------------------------------------- jobs


def commands(objects: list[Object], thing: Object) -> list[list[str]]:
    """The words of each command in a job's entry point, as the shell of the head would make them."""
    container = ray_spec(thing)["headGroupSpec"]["template"]["spec"]["containers"][0]
    script = 'python() { printf "%s\\037" "$@"; printf "\\036"; }\nset -u\n' + job_spec(thing)["entrypoint"]
    values = {**environment(objects, container), **FROM_KUBERAY}
    done = subprocess.run(
        ["sh", "-c", script], env=values, capture_output=True, text=True, timeout=10, check=False
    )
    if done.returncode:
        raise UserError(done.stderr.strip())
    return [line.split("\037")[:-1] for line in done.stdout.split("\036")[:-1]]


def parse(words: list[str]) -> Any:
    """What a job's own parser makes of its command line.

    Raises:
        UserError: as the job would.
    """
    found = _parsed(tuple(words))
    if isinstance(found, str):
        raise UserError(found)
    return found


@functools.cache  # each takes a tenth of a second, and many overlays have the same
def _parsed(words: tuple[str, ...]) -> Any:
    try:
        return _parse(*words)
    except UserError as error:
        return str(error)


def _parse(script: str, *arguments: str) -> Any:
    if not (ROOT / script).is_file():
        raise UserError(f"there is no {script}")
    config = cli.parse(Path(script).stem, arguments)
    if isinstance(config, TrainConfig):
        configs.check(config)
    elif isinstance(config, PreprocessConfig):
        configs.check_preprocess(config)
    else:
        configs.check_groups(config)
    return config


def _command_problems(objects: list[Object]) -> Iterator[str]:
    for thing in objects:
        if thing["kind"] not in ("RayJob", "RayCronJob"):
            continue
        try:
            parsed = [parse(words) for words in commands(objects, thing)]
        except UserError as error:
            yield f"{name_of(thing)}: {error}"
            continue
        if not parsed:
            yield f"{name_of(thing)}: runs nothing"
        for config in parsed:
            if isinstance(config, TrainConfig | PreprocessConfig):
                yield from _room_problems(name_of(thing), ray_spec(thing), config)
            elif isinstance(config, EvaluateConfig):
                yield from _own_room_problems(name_of(thing), ray_spec(thing), job_spec(thing))


def _own_room_problems(where: str, spec: Object, job: Object) -> Iterator[str]:
    """Whether a job that computes in its own process gets a worker for it, and that worker's GPU."""
    (group,) = spec["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    if not job.get("entrypointNumCpus"):
        yield f"{where}: computes on the head"
    elif job["entrypointNumCpus"] > quantity(limits["cpu"]):
        yield f"{where}: needs more CPUs than a worker has"
    if ("nvidia.com/gpu" in limits) != (job.get("entrypointNumGpus", 0) == 1):
        yield f"{where}: takes no GPU, or one that is not there"
    if group["replicas"] != 1:
        yield f"{where}: {group['replicas']} workers, of which it uses one"


def _room_problems(where: str, spec: Object, config: TrainConfig | PreprocessConfig) -> Iterator[str]:
    """Whether the workers that a job asks for fit its cluster."""
    runtime = config.runtime
    scales = spec.get("enableInTreeAutoscaling", False)
    room = gpus = 0
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        nodes = group["maxReplicas"] if scales else group["replicas"]
        on_node = int(quantity(limits["cpu"])) // runtime.cpus_per_worker
        gpus += nodes * int(limits.get("nvidia.com/gpu", 0))
        if runtime.device == "cuda":
            on_node = min(on_node, int(limits.get("nvidia.com/gpu", 0)))
        room += nodes * on_node
    extracting = isinstance(config, PreprocessConfig)  # which takes what room there is
    highest = 1 if isinstance(config, PreprocessConfig) else config.runtime.worker_range[1]
    if room < highest:
        yield f"{where}: {highest} workers don't fit its cluster, which has room for {room}"
    if gpus and runtime.device != "cuda":
        yield f"{where}: has GPUs and does not insist on them"
    if gpus and not extracting and highest != gpus:
        yield f"{where}: {highest} workers on {gpus} GPUs"


def _ray_problems(objects: list[Object]) -> Iterator[str]:
    """What keeps a job alive, and its cluster private and paid for no longer than needed."""
    for thing in objects:
        if thing["kind"] not in _RAY:
            continue
        where, spec = name_of(thing), ray_spec(thing)
        head = spec["headGroupSpec"]
        if spec.get("authOptions", {}).get("mode") != "token":
            yield f"{where}: no token authentication"
        if head["rayStartParams"].get("num-cpus") != "0":
            yield f"{where}: work on the head"
        if head.get("enableIngress") or head.get("serviceType", "ClusterIP") != "ClusterIP":
            yield f"{where}: the dashboard is reachable from outside"
        for group in spec["workerGroupSpecs"]:
            if group["template"]["spec"].get("terminationGracePeriodSeconds", 30) < 120:
                yield f"{where}: too little time for a checkpoint"
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"{where}: replicas outside of their bounds"
        if len(thing["metadata"]["name"]) > 36:
            yield f"{where}: the name is too long for what KubeRay makes of it"
        if thing["kind"] == "RayCluster":
            continue
        job = job_spec(thing)
        if "suspend" in thing["spec"] or "suspend" in job:
            yield f"{where}: `suspend` is Kueue's; after it, a nightly job makes up for all nights at once"
        if job.get("submissionMode", "K8sJobMode") == "K8sJobMode":
            yield f"{where}: a broken log stream fails it"
        if not job.get("shutdownAfterJobFinishes") or not job.get("ttlSecondsAfterFinished"):
            yield f"{where}: its nodes stay"
        if not job.get("backoffLimit") or not job.get("activeDeadlineSeconds"):
            yield f"{where}: neither a second attempt nor an end"
