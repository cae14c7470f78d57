"""Whether pods find room on nodes, placed one after the other as Kubernetes' scheduler does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tests.helpers.manifests import PodOf, matches, quantity

RESOURCES = ("cpu", "memory", "nvidia.com/gpu")
GIB = Decimal(2**30)


def request_of(pod: dict[str, Any]) -> dict[str, Decimal]:
    """What the scheduler sets aside for a pod: the sum of its containers, or its largest init container."""

    def of(container: dict[str, Any], resource: str) -> Decimal:
        return quantity(container.get("resources", {}).get("requests", {}).get(resource, 0))

    spec = pod["spec"]
    return {
        r: max(
            sum((of(c, r) for c in spec["containers"]), Decimal(0)),
            *(of(c, r) for c in spec.get("initContainers", [])),
            Decimal(0),
        )
        for r in RESOURCES
    }


def reserved(cores: int, memory: Decimal) -> tuple[Decimal, Decimal]:
    """What a cloud's node keeps from pods, in cores as on AKS, in bytes as on GKE: the most of three clouds."""
    kept, left = Decimal(0), memory
    for size, part in ((4, "0.25"), (4, "0.20"), (8, "0.10"), (112, "0.06")):
        step = min(left, size * GIB)
        kept, left = kept + step * Decimal(part), left - step
    return Decimal("0.1") + Decimal("0.01") * cores, kept + left * Decimal("0.02") + 100 * 2**20


@dataclass
class Node:
    """A node with what is still free on it. `gpus` of a tainted node keep pods away that don't tolerate it."""

    free: dict[str, Decimal]
    labels: dict[str, str] = field(default_factory=dict)
    tainted: bool = False
    pods: list[PodOf] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note how much there is in all."""
        self._all = dict(self.free)

    @classmethod
    def local(cls, cores: int, gigabytes: int) -> Node:
        """The one node of kind, which keeps nothing; the kernel takes a part of the memory."""
        return cls(
            dict(zip(RESOURCES, (Decimal(cores), gigabytes * GIB * Decimal("0.975"), Decimal(0)), strict=True))
        )

    @classmethod
    def of_cloud(cls, cores: int, gigabytes: int, gpus: int, spot: bool = False, tainted: bool = True) -> Node:
        """One with what it keeps for itself, and pods of the cloud on it: 300m and 400 MiB."""
        memory = gigabytes * GIB * Decimal("0.975")
        cpu, kept = reserved(cores, memory)
        free = (cores - cpu - Decimal("0.3"), memory - kept - 400 * 2**20, Decimal(gpus))
        labels = {"cloud.google.com/gke-spot": "true"} if spot else {}
        return cls(dict(zip(RESOURCES, free, strict=True)), labels, tainted and gpus > 0)

    def takes(self, pod: PodOf) -> bool:
        """Whether the pod has room here, and may and wants to come."""
        spec, needs = pod.pod["spec"], request_of(pod.pod)
        if any(needs[r] > self.free[r] for r in RESOURCES):
            return False
        if self.tainted and "nvidia.com/gpu" not in {t["key"] for t in spec.get("tolerations", [])}:
            return False
        affinity = spec.get("affinity", {})
        wanted = affinity.get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
        if wanted and not any(map(self._meets, wanted["nodeSelectorTerms"])):
            return False
        apart = affinity.get("podAntiAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", [])
        return not any(matches(term["labelSelector"], other.labels) for term in apart for other in self.pods)

    def _meets(self, term: dict[str, Any]) -> bool:
        return all(
            (self.labels.get(e["key"]) in e["values"]) is (e["operator"] == "In")
            for e in term["matchExpressions"]
        )

    def put(self, pod: PodOf) -> None:
        """Set its requests aside."""
        self.pods.append(pod)
        for resource, needed in request_of(pod.pod).items():
            self.free[resource] -= needed

    def score(self, pod: PodOf) -> Decimal:
        """The part of cores and memory that would be left: the scheduler prefers the emptier node."""
        needs = request_of(pod.pod)
        return sum(((self.free[r] - needs[r]) / self._all[r] for r in ("cpu", "memory")), Decimal(0))


def pending(pods: Iterable[PodOf], nodes: Sequence[Node]) -> list[str]:
    """Place the pods on the nodes in their order; returns the owners and roles of those that find no room."""
    left = []
    for pod in (p for p in pods for _ in range(p.count)):
        able = [node for node in nodes if node.takes(pod)]
        if able:
            max(able, key=lambda node: node.score(pod)).put(pod)
        else:
            left.append(f"{pod.owner} {pod.role}".strip())
    return left


def own_pod(owner: str, cpu: str, memory: str) -> PodOf:
    """A pod that belongs to the cluster, by what it requests."""
    container = {"name": "x", "resources": {"requests": {"cpu": cpu, "memory": memory}}}
    return PodOf(owner, "", 1, {"metadata": {}, "spec": {"containers": [container]}})
