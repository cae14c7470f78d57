"""Every overlay as an API server, KubeRay and Pod Security would see it; each check with what breaks it."""

from __future__ import annotations

import re
import tomllib

import pytest

import cvdist
from cvdist.config import PreprocessConfig
from tests.helpers.jobs import ROOT
from tests.helpers.manifests import (
    KUBERNETES,
    OPERATOR,
    OVERLAYS,
    commands,
    definition_problems,
    find,
    job_spec,
    may_connect,
    parse,
    pods,
    problems,
    ray_spec,
    render,
    schema_problems,
    with_defaults,
)

JOBS = {"preprocess", "scratch-cnn", "vgg16-features", "evaluate"}


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
    assert jobs.keys() >= JOBS
    assert all(job["spec"]["suspend"] for job in jobs.values())  # applying an overlay starts nothing
    (preprocess,), (train,) = (
        [parse(w) for w in commands(objects, jobs[n])] for n in ("preprocess", "vgg16-features")
    )
    # A cache is refused by whoever asks for another one.
    wanted = PreprocessConfig.of(train)
    assert (preprocess.features, preprocess.model) == (wanted.features, wanted.model)
    assert preprocess.data.uri == "s3://cvdist/pictures" and preprocess.features.uri == "s3://cvdist/features"
    (evaluate,) = [parse(words) for words in commands(objects, jobs["evaluate"])]
    assert evaluate.saved.source == train.run.name and evaluate.evaluation.data == preprocess.data.uri
    nightly = [parse(words) for words in commands(objects, find(objects, "RayCronJob", "nightly"))]
    assert [config.features.uri for config in nightly] == [preprocess.features.uri] * 2
    # A second attempt has a cluster of another name, and continues the same run.
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
        (OPERATOR, head, 8265),
    ]:  # fmt: skip
        assert may_connect(objects, source, target, port), (source, target, port)
    for source, target, port in [
        (worker, postgres, 5432), (mlflow, head, 8265), (stranger, mlflow, 5000), (stranger, head, 8265),
        (stranger, postgres, 5432), (postgres, bucket, 8333), (OPERATOR, mlflow, 5000), (OPERATOR, head, 10001),
        (mlflow, postgres, 22), (postgres, mlflow, 5000),
    ]:  # fmt: skip
        assert not may_connect(objects, source, target, port), (source, target, port)


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
    import subprocess

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
    "mounts shm, which is no volume": lambda o: _worker(o)["volumes"].pop(2),
    "volume cache is mounted nowhere": lambda o: _container(o)["volumeMounts"].pop(3),
    "requests 9 of cpu, above its limit": lambda o: _container(o)["resources"]["requests"].update(cpu="9"),
    "no request or limit of memory": lambda o: _container(o)["resources"]["limits"].pop("memory"),
    "request and limit of nvidia.com/gpu differ": lambda o: _container(o)["resources"]["limits"].update(
        {"nvidia.com/gpu": "2"}
    ),
    "has no probes": lambda o: _container(o).pop("readinessProbe"),
    "restricted: container ray-worker may escalate": lambda o: _container(o)["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "restricted: container ray-worker keeps capabilities": lambda o: _container(o)["securityContext"].update(
        capabilities={"drop": ["ALL"], "add": ["IPC_LOCK"]}
    ),
    "restricted: container ray-worker may run as root": lambda o: _worker(o)["securityContext"].pop(
        "runAsNonRoot"
    ),
    "restricted: container ray-worker has no seccomp profile": lambda o: _worker(o)["securityContext"].pop(
        "seccompProfile"
    ),
    "restricted: hostNetwork": lambda o: _worker(o).update(hostNetwork=True),
    "restricted: volume cache is a hostPath": lambda o: _worker(o)["volumes"].__setitem__(
        3, {"name": "cache", "hostPath": {"path": "/"}}
    ),
    "its root file system is writable": lambda o: _container(o)["securityContext"].update(
        readOnlyRootFilesystem=False
    ),
    "/dev/shm is not in memory": lambda o: _worker(o)["volumes"][2]["emptyDir"].pop("medium"),
    "above its limit of ephemeral-storage": lambda o: _worker(o)["volumes"][3]["emptyDir"].update(
        sizeLimit="5Ti"
    ),
    "gets a token for the API server": lambda o: _worker(o).update(automountServiceAccountToken=True),
    "needs a token for the API server": lambda o: ray_spec(find(o, "RayCluster", "cvdist"))["headGroupSpec"][
        "template"
    ]["spec"].update(automountServiceAccountToken=False),
    "there is no service account ray": lambda o: _drop(o, "ServiceAccount", "ray"),
    "AWS_SECRET_ACCESS_KEY is written into the manifest": lambda o: _container(o)["env"].append(
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}
    ),
    "makes no secret bucket with the key id": lambda o: _container(o)["env"].append(
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "bucket", "key": "id"}}}
    ),
    "$ARTIFACTS is not in its environment": lambda o: _settings(o).pop("ARTIFACTS"),
    "there is no such service": lambda o: _settings(o).update(MLFLOW_TRACKING_URI="http://tracking:5000"),
    "the service has no such port": lambda o: _settings(o).update(MLFLOW_TRACKING_URI="http://mlflow:5001"),
    "Service mlflow: selects no pod": lambda o: find(o, "Service", "mlflow")["spec"]["selector"].update(
        {"app.kubernetes.io/name": "x"}
    ),
    "Service mlflow: port 5000 leads nowhere: https": lambda o: find(o, "Service", "mlflow")["spec"]["ports"][
        0
    ].update(targetPort="https"),
    "Service mlflow: is reachable from outside": lambda o: find(o, "Service", "mlflow")["spec"].update(
        type="LoadBalancer"
    ),
    "PGHOST=postgres:5432: the network policies are in the way": lambda o: _drop(o, "NetworkPolicy", "mlflow"),
    "KubeRay can't submit jobs": lambda o: _drop(o, "NetworkPolicy", "ray-dashboard"),
    "can't scale: the network policies": lambda o: _drop(o, "NetworkPolicy", "ray-autoscaler"),
    "PodDisruptionBudget mlflow: selects no pod": lambda o: find(o, "PodDisruptionBudget", "mlflow")["spec"][
        "selector"
    ]["matchLabels"].update(app="x"),
    "Kubernetes can't count KubeRay's pods": lambda o: find(o, "PodDisruptionBudget", "ray-job-heads").update(
        spec={"maxUnavailable": 0, "selector": {"matchLabels": {"ray.io/node-type": "head"}}}
    ),
    "TORCH_HOME is set twice": lambda o: _container(o)["env"].append({"name": "TORCH_HOME", "value": "/"}),
    "RayJob vgg16-features: unknown flag --nam": lambda o: _entry(o, "--name", "--nam"),
    "RayJob vgg16-features: unknown recipe": lambda o: _entry(o, "dogs-cats-vgg16-features", "dogs-cats-vgg"),
    "RayJob vgg16-features: there is no jobs/trein.py": lambda o: _entry(o, "jobs/train.py", "jobs/trein.py"),
    "FEATURE: parameter not set": lambda o: _entry(o, "$FEATURES", "$FEATURE"),
    "3 workers don't fit its cluster, which has room for 2": lambda o: _settings(o).update(
        TRAIN_FLAGS="--num-workers 3 --device cuda"
    ),
    "8 workers don't fit": lambda o: _settings(o).update(TRAIN_FLAGS="--num-workers 8 --device cuda"),
    "1 workers on 2 GPUs": lambda o: _settings(o).update(TRAIN_FLAGS="--num-workers 1 --device cuda"),
    "has GPUs and does not insist on them": lambda o: _settings(o).update(TRAIN_FLAGS="--num-workers 2"),
    "RayJob evaluate: computes on the head": lambda o: find(o, "RayJob", "evaluate")["spec"].pop(
        "entrypointNumCpus"
    ),
    "RayJob evaluate: takes no GPU": lambda o: find(o, "RayJob", "evaluate")["spec"].pop("entrypointNumGpus"),
    "no token authentication": lambda o: _cluster(o).pop("authOptions"),
    "work on the head": lambda o: _cluster(o)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    "the dashboard is reachable from outside": lambda o: _cluster(o)["headGroupSpec"].update(
        serviceType="LoadBalancer"
    ),
    "too little time for a checkpoint": lambda o: _worker(o).pop("terminationGracePeriodSeconds"),
    "a broken log stream fails it": lambda o: find(o, "RayJob", "preprocess")["spec"].pop("submissionMode"),
    "its nodes stay": lambda o: find(o, "RayJob", "preprocess")["spec"].pop("ttlSecondsAfterFinished"),
    "neither a second attempt nor an end": lambda o: find(o, "RayJob", "preprocess")["spec"].pop(
        "backoffLimit"
    ),
    "secrets don't belong into manifests": lambda o: o.append(
        {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "s", "namespace": "cvdist"}}
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
