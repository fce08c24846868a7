"""What a cluster is described by: Ray's own schema, the names that are mentioned, and numbers that agree."""

import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from rpg import __version__
from rpg.config import load_config
from serve.config import load_serve_config
from serve.http.front_deadline import PROXY_ENVIRONMENT
from serve.replicas.apps import check_capacity

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def constraint(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def cluster_spec(path: Path) -> dict[str, Any]:
    """The RayClusterSpec in a RayCluster, a RayJob or a RayService."""
    [ray] = [each for each in documents(path) if each["apiVersion"] == "ray.io/v1"]
    spec: dict[str, Any] = ray["spec"]
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(ray["kind"])
    return spec[key] if key else spec


def pod_specs(path: Path) -> list[dict[str, Any]]:
    spec = cluster_spec(path)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def images() -> list[str]:
    aws = yaml.safe_load((CLUSTER / "ray-aws.yaml").read_text())
    pods = [
        container["image"] for path in KUBERAY for pod in pod_specs(path) for container in pod["containers"]
    ]
    return [aws["docker"]["image"], *pods]


def test_ray_up_takes_the_file():
    """As `ray up` does before it asks AWS for anything: defaults filled in, then Ray's JSON schema."""
    given = yaml.safe_load((CLUSTER / "ray-aws.yaml").read_text())
    config = prepare_config(given)
    validate_config(config)
    workers = [
        kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]
    ]
    assert sum(kind["max_workers"] for kind in workers) <= config["max_workers"]
    assert all(kind["resources"]["GPU"] == 1 for kind in workers)
    assert "GPU" not in config["available_node_types"][config["head_node_type"]]["resources"]


def test_ray_up_refuses_a_mistyped_key():
    """The check above can fail."""
    given = yaml.safe_load((CLUSTER / "ray-aws.yaml").read_text())
    given["available_node_types"]["gpu"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(given))


def test_every_node_runs_the_same_image_and_ray():
    assert set(images()) == {f"rpg:{__version__}"}
    assert {cluster_spec(path)["rayVersion"] for path in KUBERAY} == {constraint("ray")}
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"-t rpg:{__version__} " in dockerfile
    # Ray comes from the constraints alone: no base image brings another.
    assert {line.split()[1] for line in dockerfile.splitlines() if line.startswith("FROM")} == {
        "nvidia/cuda:${CUDA}-devel-ubuntu24.04",
        "nvidia/cuda:${CUDA}-base-ubuntu24.04",
    }
    installs = re.findall(r"pip install (.*)", dockerfile)
    assert installs
    assert all(arguments.startswith("--constraint constraints.txt") for arguments in installs)


def test_nothing_runs_as_root():
    """The image's last user is no root, and pods refuse to start an image whose user is."""
    final = (CLUSTER / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    users = re.findall(r"^USER (\S+)$", final, re.MULTILINE)
    assert users and int(users[-1]) > 0
    for path in KUBERAY:
        for pod in pod_specs(path):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert str(pod["securityContext"]["runAsUser"]) == users[-1]
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
                }  # fmt: skip


def test_the_image_sets_what_rpg_serve_sets_for_the_proxy():
    found = re.search(r"^ENV (RAY_SERVE_HTTP_PROXY.*)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    assert dict(each.split("=", 1) for each in found[1].split(" ")) == PROXY_ENVIRONMENT
    module, name = PROXY_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_nvcc_is_that_of_pytorchs_cuda():
    found = re.search(r"^ARG CUDA=(.+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    assert found[1] == constraint("cuda-toolkit")


def test_what_the_dockerfile_copies_is_in_the_build_context():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {
        name
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_pods_agree_with_themselves(path):
    for pod in pod_specs(path):
        [container] = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert "/runs" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "nvidia.com/gpu" not in pod_specs(path)[0]["containers"][0]["resources"]["limits"]


def test_all_clusters_keep_runs_on_the_same_claim():
    [claim] = [
        each
        for each in documents(CLUSTER / "kuberay" / "raycluster.yaml")
        if each["kind"] == "PersistentVolumeClaim"
    ]
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for path in KUBERAY
        for pod in pod_specs(path)
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == {claim["metadata"]["name"]}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_job_asks_for_what_its_cluster_has():
    """The entrypoint's module and config exist, its overrides are valid, its GPUs are there."""
    path = CLUSTER / "kuberay" / "rayjob-train.yaml"
    [job] = documents(path)
    python, _, module, config_path, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert importlib.util.find_spec(module) is not None
    config = load_config(ROOT / Path(config_path).relative_to("/opt/rpg"), overrides)
    gpus = sum(
        group["replicas"]
        * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster_spec(path)["workerGroupSpecs"]
    )
    assert config.ray.use_gpu
    assert config.ray.train_workers == gpus
    assert config.output.startswith("/runs/")


def test_the_service_serves_what_its_cluster_has(tmp_path):
    """Ray's own schema, the file that it names, and what the file asks for."""
    path = CLUSTER / "kuberay" / "rayservice.yaml"
    files, service = documents(path)
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert application.route_prefix == "/"
    ports = pod_specs(path)[0]["containers"][0]["ports"]
    assert {"containerPort": config.http_options.port, "name": "serve"} in ports

    file = Path(application.args["config"])
    for pod in pod_specs(path):
        mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
        [volume] = [each for each in pod["volumes"] if each["name"] == mounts[str(file.parent)]]
        assert volume["configMap"]["name"] == files["metadata"]["name"]
    (tmp_path / file.name).write_text(files["data"][file.name])
    served = load_serve_config(tmp_path / file.name)
    assert served.storage.startswith("/runs/") and all(e.path.startswith("/runs/") for e in served.generators)
    assert served.wait_for_nodes
    [group] = cluster_spec(path)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    there = {"GPU": group["replicas"] * float(limits["nvidia.com/gpu"]), "CPU": float(limits["cpu"])}
    check_capacity(replace(served, wait_for_nodes=False), there)
    # Another cluster beside it would wait for the storage for ever.
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}


# The fields of KubeRay's API reference (docs/cluster.md says which versions), for the kinds used here.
FIELDS = {
    "RayCluster": {"apiVersion", "kind", "metadata", "spec"},
    "RayJobSpec": {
        "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "clusterSelector",
        "submitterConfig", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources",
        "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
        "shutdownAfterJobFinishes", "suspend",
    },
    "RayServiceSpec": {
        "rayClusterDeletionDelaySeconds", "serviceUnhealthySecondThreshold",
        "deploymentUnhealthySecondThreshold", "serveService", "upgradeStrategy", "serveConfigV2",
        "rayClusterConfig", "excludeHeadPodFromServeSvc",
    },
    "RayClusterSpec": {
        "suspend", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
        "headGroupSpec",
        "rayVersion", "workerGroupSpecs", "authOptions",
    },
    "AutoscalerOptions": {
        "resources", "image", "imagePullPolicy", "idleTimeoutSeconds", "upscalingMode", "version", "env",
    },
    "AuthOptions": {"mode", "secretName"},
    "HeadGroupSpec": {"template", "headService", "enableIngress", "rayStartParams", "serviceType"},
    "WorkerGroupSpec": {
        "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds",
        "rayStartParams", "template", "scaleStrategy", "numOfHosts",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_knows_every_field(path):
    [ray] = [each for each in documents(path) if each["apiVersion"] == "ray.io/v1"]
    assert set(ray) <= FIELDS["RayCluster"]
    spec = cluster_spec(path)
    if ray["kind"] == "RayJob":
        assert set(ray["spec"]) <= FIELDS["RayJobSpec"]
    if ray["kind"] == "RayService":
        assert set(ray["spec"]) <= FIELDS["RayServiceSpec"]
    assert set(spec) <= FIELDS["RayClusterSpec"]
    assert set(spec.get("autoscalerOptions", {})) <= FIELDS["AutoscalerOptions"]
    assert set(spec["authOptions"]) <= FIELDS["AuthOptions"]
    assert set(spec["headGroupSpec"]) <= FIELDS["HeadGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= FIELDS["WorkerGroupSpec"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # KubeRay takes strings alone here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
