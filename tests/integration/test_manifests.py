"""Every overlay as an API server, KubeRay and Pod Security would see it; each check with what breaks it."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
import yaml

import cvdist
from cvdist.config import PreprocessConfig
from tests.helpers.api_server import api_server
from tests.helpers.documents import commands_of, paragraphs
from tests.helpers.jobs import ROOT
from tests.helpers.manifests import (
    API_SERVER_PORTS,
    KUBERNETES,
    OPERATORS,
    OVERLAYS,
    applied,
    commands,
    definition_problems,
    find,
    job_spec,
    matches,
    may_connect,
    parse,
    pods,
    problems,
    quantity,
    ray_spec,
    render,
    schema_problems,
    token_path,
    with_defaults,
)
from tests.helpers.nodes import RESOURCES, Node, own_pod, pending, request_of

JOBS = {"preprocess", "scratch-cnn", "vgg16-features", "evaluate"}
DOCUMENT = ROOT / "docs" / "kubernetes.md"

KUBERAY = "1.7.0"
"""The version whose controllers the rules here and `OPERATORS` were read from."""
STATUS_CHECK_SECONDS = 300
"""So long a job's head need not answer before the job fails; RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS sets it."""
NOT_RETRIED = ("JobStatusCheckTimeoutExceeded", "DeadlineExceeded")
"""Reasons of a failure after which there is no further attempt, whatever `backoffLimit` says."""
MAX_JOB_NAME = 47  # characters


def longest(job):
    """Seconds that all attempts of a job may take: its limits count from the attempt's beginning."""
    spec = job_spec(job)
    return (spec["backoffLimit"] + 1) * spec["activeDeadlineSeconds"]


def jobs_made(created, last_run, now):
    """How many jobs a daily RayCronJob makes at once when the operator looks at it: one for each missed day."""
    return now - max(created, last_run)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong(overlay):
    assert problems(render(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_accepts_it_and_its_pods(overlay):
    assert [p for version in KUBERNETES for p in schema_problems(render(overlay), version)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_accepts_it(overlay):
    objects = render(overlay)
    assert definition_problems(objects) == []
    # The same holds with the defaults that the API server adds.
    completed = [with_defaults(o) if o["apiVersion"] == "ray.io/v1" else o for o in objects]
    assert problems(completed) == [] and definition_problems(completed) == []


def test_the_overlays_are_those_that_the_documentation_names():
    assert OVERLAYS == ["cpu", "gpu", "kueue", "multi-node-nccl", "spot"]
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert all(f"`{overlay}`" in text for overlay in OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_and_their_commands(overlay):
    objects = render(overlay)
    jobs = {o["metadata"]["name"]: o for o in objects if o["kind"] == "RayJob"}
    assert jobs.keys() == JOBS
    assert not {o["kind"] for o in applied(overlay)} & {
        "RayJob",
        "RayCronJob",
    }  # applying starts and stops nothing
    (preprocess,), (train,) = (
        [parse(w) for w in commands(objects, jobs[n])] for n in ("preprocess", "vgg16-features")
    )
    # A cache is refused to those who ask for another one.
    wanted = PreprocessConfig.of(train)
    assert (preprocess.features, preprocess.model) == (wanted.features, wanted.model)
    assert preprocess.data.uri == "s3://cvdist/pictures" and preprocess.features.uri == "s3://cvdist/features"
    (evaluate,) = [parse(words) for words in commands(objects, jobs["evaluate"])]
    assert evaluate.saved.source == train.run.name and evaluate.evaluation.data == preprocess.data.uri
    nightly = [parse(words) for words in commands(objects, find(objects, "RayCronJob", "nightly"))]
    assert [config.features.uri for config in nightly] == [preprocess.features.uri] * 2
    # A second attempt has a cluster of another name, and continues the same run. So do jobs: they name it.
    assert all("run=" in job_spec(jobs[name])["entrypoint"] for name in JOBS - {"preprocess"})
    assert nightly[1].run.name == "nightly-29400000"


def test_what_each_overlay_is_for():
    gpu, cpu, spot = render("gpu"), render("cpu"), render("spot")

    def workers(objects, kind="RayCluster", name="cvdist"):
        return ray_spec(find(objects, kind, name))["workerGroupSpecs"][0]

    def limits(objects):
        return workers(objects)["template"]["spec"]["containers"][0]["resources"]["limits"]

    assert limits(gpu)["nvidia.com/gpu"] == "1" and limits(render("multi-node-nccl"))["nvidia.com/gpu"] == "8"
    assert not any("gpu" in str(pod.pod) for pod in pods(cpu))
    cluster = find(gpu, "RayCluster", "cvdist")["spec"]
    assert cluster["enableInTreeAutoscaling"] and (
        workers(gpu)["minReplicas"],
        workers(gpu)["maxReplicas"],
    ) == (0, 4)
    affinity = [p.pod["spec"]["affinity"]["nodeAffinity"] for p in pods(spot) if p.role]
    assert all("requiredDuringSchedulingIgnoredDuringExecution" in a for a in affinity)
    (train,) = [parse(w) for w in commands(spot, find(spot, "RayJob", "vgg16-features"))]
    assert train.checkpoint.every > 0 and train.runtime.worker_range == (2, 4)
    kueue = render("kueue")
    queued = [o for o in kueue if o["kind"] in ("RayJob", "RayCluster")]
    assert {o["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for o in queued} == {"cvdist"}
    assert not any(ray_spec(o).get("enableInTreeAutoscaling") for o in queued)  # Kueue admits fixed sizes
    names = {e["name"] for e in workers(render("multi-node-nccl"))["template"]["spec"]["containers"][0]["env"]}
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= names


def test_the_network_lets_through_what_is_needed_and_nothing_else():
    objects = render("cpu")
    labels = {f"{pod.owner} {pod.role}".strip(): pod.labels for pod in pods(objects)}
    worker, head = labels["RayJob preprocess worker"], labels["RayJob preprocess head"]
    mlflow, postgres = labels["Deployment mlflow"], labels["StatefulSet postgres"]
    bucket, stranger = labels["StatefulSet seaweedfs"], {"app": "stranger"}
    for source, target, port in [
        (worker, head, 6379), (head, worker, 31234), (worker, worker, 45678), (worker, mlflow, 5000),
        (head, mlflow, 5000), (mlflow, postgres, 5432), (worker, bucket, 8333), (mlflow, bucket, 8333),
        *((operator, head, 8265) for operator in OPERATORS.values()),
    ]:  # fmt: skip
        assert may_connect(objects, source, target, port), (source, target, port)
    for source, target, port in [
        (worker, postgres, 5432), (mlflow, head, 8265), (stranger, mlflow, 5000), (stranger, head, 8265),
        (stranger, postgres, 5432), (postgres, bucket, 8333), (OPERATORS["helm"], mlflow, 5000),
        (OPERATORS["helm"], head, 10001), ({"app.kubernetes.io/name": "kuberay"}, head, 8265),
        (mlflow, postgres, 22), (postgres, mlflow, 5000),
    ]:  # fmt: skip
        assert not may_connect(objects, source, target, port), (source, target, port)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_where_it_scales_only_the_autoscaler_has_a_token(overlay):
    """KubeRay's role may patch every RayCluster and pod: the code of jobs, on the head, must not have it."""
    tokens = {
        (pod.role, container["name"])
        for pod in pods(render(overlay))
        for container in pod.containers
        if pod.pod["spec"]["automountServiceAccountToken"] or token_path(pod.pod, container)
    }
    assert tokens == ({("head", "autoscaler")} if overlay != "kueue" else set())


def test_time_limits_are_the_documented_ones_over_all_attempts():
    objects = render("gpu")
    jobs = {o["metadata"]["name"]: o for o in objects if o["kind"] in ("RayJob", "RayCronJob")}
    row = r"^\| (`[^|]+) \| (\d+) minutes \| (\d+) hours \| (\d+) hours \|$"
    said = {
        name: tuple(map(int, numbers))
        for names, *numbers in re.findall(row, DOCUMENT.read_text(), re.MULTILINE)
        for name in re.findall(r"`(\S+)`", names)
    }
    true = {
        name: (
            job_spec(job)["preRunningDeadlineSeconds"] / 60,
            job_spec(job)["activeDeadlineSeconds"] / 3600,
            longest(job) / 3600,
        )
        for name, job in jobs.items()
    }
    assert said == true
    # Meant: a day for all features, an hour until there are pods; each night's job is over before the next one.
    assert longest(jobs["preprocess"]) == 86400
    for spec in map(job_spec, jobs.values()):
        assert (spec["backoffLimit"] + 1) * spec["preRunningDeadlineSeconds"] == 3600
    nightly = jobs["nightly"]["spec"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", nightly["schedule"])  # once a day
    assert longest(jobs["nightly"]) + nightly["jobTemplate"]["ttlSecondsAfterFinished"] + 60 < 86400


def test_nights_that_were_missed_are_not_made_up_for():
    """After ten nights of `suspend`, KubeRay would make ten jobs at once; after a deletion it makes none."""
    assert jobs_made(created=0, last_run=0, now=10) == 10
    assert jobs_made(created=10, last_run=0, now=10) == 0
    for overlay in OVERLAYS:
        assert not any("suspend" in o["spec"] | job_spec(o) for o in render(overlay) if "Job" in o["kind"])
    words = [shlex.split(line) for line in commands_of(DOCUMENT).splitlines() if "nightly" in line]
    assert words == [
        ["k8s/job.sh", "gpu", "nightly"],
        ["kubectl", "-n", "cvdist", "delete", "raycronjob", "nightly", "--cascade=orphan"],
        ["k8s/job.sh", "gpu", "nightly"],
    ]
    assert f"KubeRay {KUBERAY} makes up for every night" in DOCUMENT.read_text()


def test_a_lost_head_has_the_time_that_the_document_says():
    (install,) = re.findall(r"helm install (?:.*\\\n)*.*", commands_of(DOCUMENT))
    words = shlex.split(install.replace("\\\n", ""))
    assert words[words.index("--version") + 1] == KUBERAY
    values = dict(words[i + 1].split("=", 1) for i, w in enumerate(words) if w in ("--set", "--set-string"))
    assert values["env[0].name"] == "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"
    # A variable's value is a string; Helm would make a number of it.
    assert words[words.index(f"env[0].value={values['env[0].value']}") - 1] == "--set-string"
    seconds, text = int(values["env[0].value"]), DOCUMENT.read_text()
    assert (
        f"for {seconds // 60} minutes (as installed in step 1; {STATUS_CHECK_SECONDS // 60} by default)" in text
    )
    assert all(reason in text for reason in NOT_RETRIED[:1]) and seconds > 2 * STATUS_CHECK_SECONDS
    # Else its limit would end the job first.
    jobs = [o for o in render("gpu") if o["kind"] in ("RayJob", "RayCronJob")]
    assert all(seconds < job_spec(job)["activeDeadlineSeconds"] for job in jobs)


# -------------------------------------------------------------------------------------------------- nodes

KIND = [own_pod("kind", "950m", "290Mi")]
"""What kind's own pods request: DNS, etcd, the API server, the controllers, the network."""
OPERATOR = own_pod("operator", "100m", "512Mi")


def documented_nodes(overlay):
    """The nodes of an overlay, in the document's table."""
    (row,) = re.findall(rf"^\| `{overlay}` \|[^|]*\| ([^|]*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    nodes = []
    for part in row.split("; "):
        found = re.fullmatch(
            r"(\d+) (spot )?nodes? with (\d+) cores(?: and (\d+) GB|, (\d+) GB and (\d+) GPUs?)", part
        )
        count, spot, cores, small, large, gpus = found.groups()
        for _ in range(int(count)):
            if overlay == "cpu":
                nodes.append(Node.local(int(cores), int(small)))
            else:
                nodes.append(Node.of_cloud(int(cores), int(small or large), int(gpus or 0), bool(spot)))
    return nodes


def without_room(overlay, job, nodes):
    """The pods that stay pending: the operator comes first, then what is applied, then the job."""
    own = pods([find(render(overlay), "RayJob", job)])
    return pending([*(KIND if overlay == "cpu" else []), OPERATOR, *pods(applied(overlay)), *own], nodes)


@pytest.mark.parametrize("job", sorted(JOBS))
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_documented_nodes_have_room(overlay, job):
    assert without_room(overlay, job, documented_nodes(overlay)) == []


def test_what_was_seen_to_have_no_room_has_none():
    """On a real scheduler; without this, the packing above might say of any nodes that they do."""
    gpu = [Node.of_cloud(8, 32, 1, tainted=False) for _ in range(2)]
    assert without_room("gpu", "preprocess", gpu).count("RayJob preprocess worker") == 2
    one = [Node.of_cloud(8, 32, 1), Node.of_cloud(8, 32, 1), Node.of_cloud(4, 16, 0)]
    assert "RayJob preprocess head" in without_room("gpu", "preprocess", one)
    before = own_pod("what the pods requested more", "800m", "4Gi")
    assert pending([*KIND, OPERATOR, before], [Node.local(4, 16)]) == []
    nodes = [Node.local(4, 16)]
    nodes[0].put(before)
    assert "RayJob preprocess worker" in without_room("cpu", "preprocess", nodes)


def test_kueue_has_room_for_the_standing_cluster_and_a_job():
    queues = list(yaml.safe_load_all((ROOT / "k8s" / "overlays" / "kueue" / "queues.yaml").read_text()))
    # v1beta1 is deprecated since Kueue 0.19.
    assert {o["apiVersion"] for o in queues} == {"kueue.x-k8s.io/v1beta2"}
    (flavor,) = find(queues, "ClusterQueue", "cvdist")["spec"]["resourceGroups"][0]["flavors"]
    room = {r["name"]: quantity(r["nominalQuota"]) for r in flavor["resources"]}
    queued = [p for p in pods(render("kueue")) if p.owner in ("RayCluster cvdist", "RayJob preprocess")]
    for resource in RESOURCES:
        assert 0 < sum(p.count * request_of(p.pod)[resource] for p in queued) <= room[resource], resource


# ------------------------------------------------------------------------------- the document's commands


@pytest.fixture
def kubernetes(tmp_path):
    """A stand-in for a cluster, and a function that runs a command against it."""
    binary = shutil.which("kubectl")
    if binary is None:
        pytest.skip("kubectl is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    # The stand-in has no schemas.
    wrapper = (
        f'#!/bin/sh\ncase $1 in apply|create) exec {binary} "$@" --validate=false;; esac\nexec {binary} "$@"\n'
    )
    (tools / "kubectl").write_text(wrapper)
    (tools / "kubectl").chmod(0o755)
    with api_server() as api:
        (tmp_path / "config").write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": api.url}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c"}}],
                    "current-context": "c",
                }
            )
        )
        environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "KUBECONFIG": str(tmp_path / "config"),
            "KUBECACHEDIR": str(tmp_path / "cache"),
        }

        def run(line, code=0):
            done = subprocess.run(
                shlex.split(line),
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == code, done.stdout + done.stderr
            return done.stdout + done.stderr

        yield api, run


def test_jobs_are_created_beside_running_ones_and_applying_again_leaves_all_of_them_alone(kubernetes):
    api, run = kubernetes
    run("kubectl apply -k k8s/overlays/gpu")
    jobs = [run("k8s/job.sh gpu vgg16-features").strip(), run("k8s/job.sh gpu vgg16-features pets-2").strip()]
    assert len(set(jobs)) == 2 and all(re.fullmatch(r"rayjob.ray.io/vgg16-features-\w{5}", job) for job in jobs)
    run("k8s/job.sh gpu nightly")
    assert "AlreadyExists" in run("k8s/job.sh gpu nightly", code=1)  # there is one
    path = "/apis/ray.io/v1/namespaces/cvdist"
    made = [api.objects[f"{path}/rayjobs/{job.partition('/')[2]}"] for job in jobs]
    runs = [parse(commands(render("gpu"), job)[0]).run.name for job in made]
    assert runs == ["vgg16-features", "pets-2"]
    # What was created is what the tests above look at, under another name.
    expected = find(render("gpu"), "RayJob", "vgg16-features")
    assert made[0]["spec"] == expected["spec"] and len(made[0]["metadata"]["name"]) < MAX_JOB_NAME
    # The operator and the autoscaler have been at work.
    for thing in (*made, api.objects[f"{path}/raycronjobs/nightly"]):
        thing["status"] = {"jobDeploymentStatus": "Running"}
    cluster = api.objects[f"{path}/rayclusters/cvdist"]
    cluster["spec"]["workerGroupSpecs"][0]["replicas"] = 2
    api.writes.clear()
    said = run("kubectl apply -k k8s/overlays/gpu")
    # kubectl sends the budgets again, as they are. The number of workers is the autoscaler's: while there is
    # one, KubeRay ends no worker because of `replicas`.
    changed = [where for _, where in api.writes if "/poddisruptionbudgets/" not in where]
    assert changed in ([], [f"{path}/rayclusters/cvdist"]) and cluster["spec"]["enableInTreeAutoscaling"], said


def test_mistakes_in_creating_a_job_are_one_line(kubernetes):
    _, run = kubernetes
    for line, message in (
        ("k8s/job.sh gpu", "error: usage: k8s/job.sh OVERLAY JOB [RUN]"),
        ("k8s/job.sh gpus preprocess", "error: no overlay gpus: there are cpu gpu kueue multi-node-nccl spot"),
        ("k8s/job.sh gpu train", "error: no job train: there are evaluate nightly preprocess scratch-cnn"),
        ("k8s/job.sh gpu preprocess pets", "error: preprocess has no run to name"),
        ("k8s/job.sh gpu evaluate a/b", "error: 'a/b' is no name of a run"),
    ):
        said = run(line, code=2)
        assert said.startswith(message) and said.count("\n") == 1


CLOUDS = {
    # Where a cluster's names, API server and credentials are; from the documentation of each.
    "on-gke": [("169.254.169.254", 53, "UDP")],
    "on-gke-workload-identity": [("169.254.169.254", 80, "TCP"), ("169.254.169.252", 988, "TCP")],
    "on-eks": [("172.20.0.10", 53, "UDP"), ("10.100.0.10", 53, "UDP"), ("169.254.170.23", 80, "TCP")],
    "on-aks": [("169.254.10.10", 53, "UDP"), ("169.254.10.11", 53, "UDP")],
}


def may_leave(objects, labels, address, port, protocol):
    """Whether the policies let a pod reach an address."""
    rules = [
        rule
        for o in objects
        if o["kind"] == "NetworkPolicy" and matches(o["spec"]["podSelector"], labels)
        for rule in o["spec"].get("egress", [])
        if {"port": port, "protocol": protocol} in rule.get("ports", [])
    ]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer]
    target = ipaddress.ip_address(address)
    return any(
        target in ipaddress.ip_network(block["cidr"])
        and not any(target in ipaddress.ip_network(out) for out in block.get("except", []))
        for block in blocks
    )


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The overlay and the jobs of the document's example, each with all components for clouds."""
    root = tmp_path_factory.mktemp("site") / "k8s"
    shutil.copytree(ROOT / "k8s", root)
    text = DOCUMENT.read_text()
    overlay, jobs = [p for p in paragraphs(DOCUMENT) if p.startswith("apiVersion: kustomize")]
    assert "`k8s/overlays/mine/kustomization.yaml`" in text and "`k8s/jobs/mine/kustomization.yaml`" in text
    components = ", ".join(f"../../components/{name}" for name in [*CLOUDS, "workload-identity"])
    for folder, content in (("overlays", overlay), ("jobs", jobs)):
        (root / folder / "mine").mkdir()
        (root / folder / "mine" / "kustomization.yaml").write_text(content)
        (root / folder / "clouds").mkdir()
        content = content.replace("../../components/on-gke", components).replace(
            "overlays/mine", "overlays/clouds"
        )
        (root / folder / "clouds" / "kustomization.yaml").write_text(content)
    return root


@pytest.mark.parametrize("site", ["mine", "clouds"])
def test_a_site_of_ones_own_as_documented(mine, site):
    objects = render(site, mine)
    assert problems(objects) == [] and definition_problems(objects) == []
    assert [p for version in KUBERNETES for p in schema_problems(objects, version)] == []
    assert find(objects, "ConfigMap", "settings")["data"]["PICTURES"] == "s3://mine/pictures"
    assert find(objects, "ConfigMap", "settings")["data"]["TRAIN_FLAGS"]  # the others stay
    ours = {c["image"] for pod in pods(objects) for c in pod.containers if "cvdist" in c["image"]}
    assert ours == {f"REGISTRY/cvdist:{cvdist.__version__}", f"REGISTRY/cvdist-mlflow:{cvdist.__version__}"}
    # With workload identity, no pod has the bucket's keys.
    variables = {v["name"] for pod in pods(objects) for c in pod.containers for v in c.get("env", [])}
    assert ("AWS_SECRET_ACCESS_KEY" in variables) is (site == "mine")


@pytest.mark.parametrize("component", CLOUDS)
def test_the_policies_of_a_cloud_open_what_it_needs(mine, component):
    _, worker = (pod.labels for pod in pods([find(render("gpu"), "RayJob", "preprocess")]))
    for address, port, protocol in CLOUDS[component]:
        assert not may_leave(render("gpu"), worker, address, port, protocol), "was closed"
        assert may_leave(render("clouds", mine), worker, address, port, protocol)
    # The node's own credentials, where there is no Workload Identity.
    assert not may_leave(render("mine", mine), worker, "169.254.169.254", 80, "TCP")
    assert f"`{component}`" in DOCUMENT.read_text()
    assert all(str(port) in DOCUMENT.read_text() for port in API_SERVER_PORTS)


def test_versions_are_one():
    lock = (ROOT / "requirements.lock").read_text()
    (ray,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    (mlflow,) = re.findall(r"^mlflow==(\S+)", lock, re.MULTILINE)
    assert f"\nmlflow=={mlflow} " in (ROOT / "requirements-mlflow.lock").read_text()
    dockerfile = (ROOT / "Dockerfile").read_text()
    # Of both images, after the layers of packages, which another version leaves as they are.
    assert len(re.findall(r"COPY --from=\S+ /opt/\S+ /opt/venv\n(?:.*\n)*?ARG VERSION=\n", dockerfile)) == 2
    # Both images have their packages from the locks, and from nowhere else.
    installs = re.findall(r"install [^&]*?-r (\S+)", dockerfile.replace("\\\n", " "))
    assert installs == ["torch.lock", "rest.lock", "requirements-mlflow.lock"]
    assert dockerfile.count("--require-hashes") == len(installs) == dockerfile.count("pip --python")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == cvdist.__version__
    for overlay in OVERLAYS:
        objects = render(overlay)
        assert {ray_spec(o)["rayVersion"] for o in objects if o["apiVersion"] == "ray.io/v1"} == {ray}
        images = {c["image"] for pod in pods(objects) for c in pod.containers}
        ours = {image for image in images if image.startswith("cvdist")}
        suffix = "-cpu" if overlay == "cpu" else ""
        assert ours == {f"cvdist:{cvdist.__version__}{suffix}", f"cvdist-mlflow:{cvdist.__version__}"}
        assert all(re.search(r":[\w.-]*\d[\w.-]*$", image) for image in images)  # pinned


def test_the_lock_is_divided_and_nothing_is_lost():
    """The image's awk programs, run on the lock."""
    text = (ROOT / "Dockerfile").read_text()
    torch, cpu, rest = re.findall(r"awk '([^']+)'", text)

    def names(program, content):
        done = subprocess.run(["awk", program], input=content, capture_output=True, text=True, check=True)
        return set(re.findall(r"^([a-z0-9][\w.-]*)==", done.stdout, re.MULTILINE)), done.stdout

    lock = (ROOT / "requirements.lock").read_text()
    everything = set(re.findall(r"^([a-z0-9][\w.-]*)==", lock, re.MULTILINE))
    (first, content), (second, _) = names(torch, lock), names(rest, lock)
    assert first | second == everything and not first & second
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13"} <= first and {"ray", "nvidia-ml-py"} <= second
    assert first - names(cpu, content)[0] == {"triton", "cuda-bindings", "cuda-pathfinder"}
    assert content.count("--hash=") > len(first)  # the hashes come along


# ------------------------------------------------------------------------------------- what the checks catch


def _cluster(objects):
    return ray_spec(find(objects, "RayJob", "preprocess"))


def _standing(objects):
    return ray_spec(find(objects, "RayCluster", "cvdist"))


def _worker(objects):
    return _cluster(objects)["workerGroupSpecs"][0]["template"]["spec"]


def _container(objects):
    return _worker(objects)["containers"][0]


def _settings(objects):
    return find(objects, "ConfigMap", "settings")["data"]


def _drop(objects, kind, name):
    objects.remove(find(objects, kind, name))


def _entry(objects, old, new):
    spec = job_spec(find(objects, "RayJob", "vgg16-features"))
    assert old in spec["entrypoint"]
    spec["entrypoint"] = spec["entrypoint"].replace(old, new)


BROKEN = {
    "restricted: container ray-worker keeps capabilities": lambda o: _container(o)["securityContext"].update(
        capabilities={"drop": ["ALL"], "add": ["IPC_LOCK"]}
    ),
    "restricted: volume cache is a hostPath": lambda o: _worker(o)["volumes"].__setitem__(
        3, {"name": "cache", "hostPath": {"path": "/"}}
    ),
    "above its limit of ephemeral-storage": lambda o: _worker(o)["volumes"][3]["emptyDir"].update(
        sizeLimit="5Ti"
    ),
    "autoscaler needs a token for the API server": lambda o: _standing(o)["autoscalerOptions"][
        "volumeMounts"
    ].pop(),
    "ray-head gets a token for the API server": lambda o: _standing(o)["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0]["volumeMounts"].append({"name": "kubernetes", "mountPath": "/token"}),
    "RayJob preprocess: `suspend` is Kueue's": lambda o: find(o, "RayJob", "preprocess")["spec"].update(
        suspend=True
    ),
    "makes no secret bucket with the key id": lambda o: _container(o)["env"].append(
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "bucket", "key": "id"}}}
    ),
    "$ARTIFACTS is not in its environment": lambda o: _settings(o).pop("ARTIFACTS"),
    "the service has no such port": lambda o: _settings(o).update(MLFLOW_TRACKING_URI="http://mlflow:5001"),
    "Service mlflow: port 5000 leads nowhere: https": lambda o: find(o, "Service", "mlflow")["spec"]["ports"][
        0
    ].update(targetPort="https"),
    "PGHOST=postgres:5432: the network policies are in the way": lambda o: _drop(o, "NetworkPolicy", "mlflow"),
    "KubeRay (helm) can't submit jobs": lambda o: _drop(o, "NetworkPolicy", "ray-dashboard"),
    "KubeRay (kustomize) can't submit jobs": lambda o: find(o, "NetworkPolicy", "ray-dashboard")["spec"][
        "ingress"
    ][0]["from"][0].update(podSelector={"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}),
    "can't scale: the network policies": lambda o: _drop(o, "NetworkPolicy", "ray-autoscaler"),
    "PodDisruptionBudget mlflow: selects no pod": lambda o: find(o, "PodDisruptionBudget", "mlflow")["spec"][
        "selector"
    ]["matchLabels"].update(app="x"),
    "Kubernetes can't count KubeRay's pods": lambda o: find(o, "PodDisruptionBudget", "ray-job-heads").update(
        spec={"maxUnavailable": 0, "selector": {"matchLabels": {"ray.io/node-type": "head"}}}
    ),
    "RayJob vgg16-features: unknown flag --nam": lambda o: _entry(o, "--name", "--nam"),
    "RayJob vgg16-features: there is no jobs/trein.py": lambda o: _entry(o, "jobs/train.py", "jobs/trein.py"),
    "FEATURE: parameter not set": lambda o: _entry(o, "$FEATURES", "$FEATURE"),
    "3 workers don't fit its cluster, which has room for 2": lambda o: _settings(o).update(
        TRAIN_FLAGS="--num-workers 3 --device cuda"
    ),
    "1 workers on 2 GPUs": lambda o: _settings(o).update(TRAIN_FLAGS="--num-workers 1 --device cuda"),
    "has GPUs and does not insist on them": lambda o: _settings(o).update(TRAIN_FLAGS="--num-workers 2"),
    "RayJob evaluate: computes on the head": lambda o: find(o, "RayJob", "evaluate")["spec"].pop(
        "entrypointNumCpus"
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_broken_is_caught(message):
    objects = render("gpu")
    BROKEN[message](objects)
    found = problems(objects)
    assert any(message in problem for problem in found), found


def test_schemas_refuse_what_they_do_not_know():
    objects = render("gpu")
    find(objects, "Deployment", "mlflow")["spec"]["replica"] = 2
    _container(objects)["resource"] = {}
    _worker(objects)["tolerations"][0]["operator"] = 1
    text = "\n".join(schema_problems(objects, KUBERNETES[0]))
    assert "Deployment mlflow: spec: Additional properties" in text and "'replica' was unexpected" in text
    assert "pod of RayJob preprocess" in text and text.count("pod of") == 1  # the first of the two in one pod


def test_definitions_refuse_what_they_do_not_know():
    objects = render("gpu")
    preprocess, nightly = find(objects, "RayJob", "preprocess"), find(objects, "RayCronJob", "nightly")
    preprocess["spec"]["backOffLimit"] = 3
    _cluster(objects)["workerGroupSpecs"][0]["replica"] = 3
    _container(objects)["volumeMounts"][0]["path"] = "/x"
    preprocess["spec"]["activeDeadlineSeconds"] = "a day"
    nightly["spec"].pop("schedule")
    find(objects, "RayCluster", "cvdist")["spec"]["authOptions"]["mode"] = "tokens"
    text = "\n".join(definition_problems(objects))
    for message in (
        "'backOffLimit'",
        "'replica'",
        "'path'",
        "'a day' is not of type",
        "'schedule' is a required",
        "'tokens' is not one of",
    ):
        assert message in text, (message, text)
    # What is left out is what the definition says: a log stream that fails the job.
    preprocess["spec"].pop("submissionMode")
    assert with_defaults(preprocess)["spec"]["submissionMode"] == "K8sJobMode"
