"""Files of a deployment: KubeRay manifests by Kubernetes' own types, the Dockerfiles, cluster.yaml by Ray's schema."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raycomplete import __version__
from raycomplete.commands.submit import STOP_WAIT_S
from raycomplete.config import load_run_file
from raycomplete.serving.deployment import _ACTOR_OPTIONS
from tests.conftest import ROOT

DEPLOY = ROOT / "jobs" / "deploy"
FOLDER = DEPLOY / "kuberay"
SOURCES = "/opt/raycomplete/"  # where the image holds the checkout
# Where each kind keeps the cluster, and its fields that we use.
CLUSTER_AT = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
FIELDS = {
    "RayCluster": set(),
    "RayJob": set(
        "rayClusterSpec entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished".split()
    ),
    "RayService": {"rayClusterConfig", "serveConfigV2", "upgradeStrategy"},
}
CLUSTER_FIELDS = set(
    "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs".split()
)
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "labels", "rayStartParams", "template"}
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"), key=str)
QUANTITY = re.compile(r"^\d+(\.\d+)?(m|[KMGT]i?)?$")


kinds = pytest.mark.parametrize("kind", list(CLUSTER_AT))
dockerfiles = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def documents() -> list[dict[str, Any]]:
    return [tree for path in sorted(FOLDER.glob("*.yaml")) for tree in yaml.safe_load_all(path.read_text("utf-8"))]


def resources(kind: str) -> dict[str, Any]:
    (found,) = (tree for tree in documents() if tree["kind"] == kind)
    return found


def cluster_of(kind: str) -> dict[str, Any]:
    node = resources(kind)["spec"]
    for key in CLUSTER_AT[kind]:
        node = node[key]
    return node


def pods(kind: str) -> dict[str, dict[str, Any]]:
    """Pod specs by group, the head's first."""
    cluster = cluster_of(kind)
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def unknown(given: Any, taken: Any, where: str = "") -> Iterator[str]:
    """Keys that were given and that a typed reading of the same dropped."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in taken:
                yield f"{where}.{key}"
            else:
                yield from unknown(value, taken[key], f"{where}.{key}")
    elif isinstance(given, list):
        for index, (value, kept) in enumerate(zip(given, taken, strict=True)):
            yield from unknown(value, kept, f"{where}[{index}]")


def check_type(tree: dict[str, Any], name: str) -> list[str]:
    """Unknown fields of a Kubernetes type; a value of a wrong type raises."""
    models = pytest.importorskip("lightkube.models.core_v1", reason="comes with the dev extra")
    msgspec = pytest.importorskip("msgspec")
    return list(unknown(tree, msgspec.to_builtins(msgspec.convert(tree, getattr(models, name)))))


@kinds
def test_pods_hold_only_fields_that_kubernetes_knows(kind: str) -> None:
    for name, pod in pods(kind).items():
        assert check_type(pod, "PodSpec") == [], name
    broken = dict(pods(kind)["head"], restartPolicyy="Never")
    assert check_type(broken, "PodSpec") == [".restartPolicyy"]


def test_claims_are_whole_and_every_volume_has_one() -> None:
    claims = [tree for tree in documents() if tree["kind"] == "PersistentVolumeClaim"]
    for claim in claims:
        assert check_type(claim, "PersistentVolumeClaim") == []
    modes = {claim["metadata"]["name"]: claim["spec"]["accessModes"] for claim in claims}
    for kind in CLUSTER_AT:
        for pod in pods(kind).values():
            volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
            assert modes[volumes["shared"]] == ["ReadWriteMany"]
    users = [name for name, pod in pods("RayService").items() if any(v["name"] == "state" for v in pod["volumes"])]
    assert modes["raycomplete-serve-state"] == ["ReadWriteOnce"]
    assert users == ["head"]  # one disk and one SQLite file, where Serve keeps the API and its runners
    assert all(resource.startswith("node:__internal_head__") for resource in _ACTOR_OPTIONS["resources"])


@kinds
def test_the_operator_finds_what_it_asks_for(kind: str) -> None:
    tree, cluster = resources(kind), cluster_of(kind)
    assert tree["apiVersion"] == "ray.io/v1"
    assert tree["metadata"]["name"]
    assert set(tree["spec"]) - FIELDS[kind] <= (CLUSTER_FIELDS if kind == "RayCluster" else set())
    assert set(cluster) <= CLUSTER_FIELDS
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) <= GROUP_FIELDS
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@kinds
def test_versions_are_those_of_the_lock(kind: str) -> None:
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster_of(kind)["rayVersion"] == ray
    (image,) = {pod["containers"][0]["image"] for pod in pods(kind).values()}
    assert image.endswith(f":{__version__}-ray{ray}")
    assert image in (DEPLOY / "Dockerfile").read_text()


@kinds
def test_resources_and_rights_are_bounded(kind: str) -> None:
    for name, pod in pods(kind).items():
        (container,) = pod["containers"]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests  # Ray takes what the limit says as its own
        assert all(QUANTITY.match(str(value)) for value in limits.values())
        assert ("nvidia.com/gpu" in limits) == (name != "head")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        environment = {item["name"]: item.get("value") for item in container["env"]}
        wait_s = int(environment["RAY_JOB_STOP_WAIT_TIME_S"] or 0)
        assert 60 <= wait_s < pod["terminationGracePeriodSeconds"]


def test_the_job_is_one_that_this_checkout_can_run() -> None:
    words = shlex.split(resources("RayJob")["spec"]["entrypoint"])
    assert words[0] == "python"
    script, run_file = (ROOT / word.removeprefix(SOURCES) for word in words[1:3])
    assert script.is_file()
    overrides = [word for word in words[3:] if not word.startswith("--")]
    config = load_run_file(run_file, overrides)
    assert config.output.root == Path("/shared/runs")
    assert "--resume" in words  # a second start goes on from what the first one left


def test_the_service_is_that_of_the_serve_file() -> None:
    ours = yaml.safe_load(resources("RayService")["spec"]["serveConfigV2"])
    plain = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text(encoding="utf-8"))
    for tree in (ours, plain):
        ServeDeploySchema.model_validate(tree)
    arguments = ours["applications"][0].pop("args")
    plain_arguments = plain["applications"][0].pop("args")
    assert ours.pop("http_options") == {**plain.pop("http_options"), "host": "0.0.0.0"}
    assert ours == plain
    assert arguments["run_file"] == SOURCES + plain_arguments["run_file"]
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "run_file"]
    config = load_run_file(ROOT / plain_arguments["run_file"], overrides)
    assert config.serve.host == "0.0.0.0"  # so that the service insists on a token
    assert config.serve.state.is_absolute()


def test_there_is_one_image_for_gpus_and_one_for_cpus() -> None:
    extras = {path.name: re.findall(r"EXTRA=(\w+)", path.read_text(encoding="utf-8")) for path in DOCKERFILES}
    assert extras == {"Dockerfile": ["gpu"], "Dockerfile.cpu": ["cpu"]}
    assert {".git", ".venv", "runs"} <= set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())


@dockerfiles
def test_an_image_is_built_as_a_user_without_rights_in_a_folder_of_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    found = [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]
    assert {word for word, _ in found} <= {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    assert found[0][0] == "FROM"
    assert ":" in found[0][1]  # never `latest`
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
    place = next(index for index, (word, rest) in enumerate(found) if word == "RUN" and "make setup" in rest)
    owned = {("USER", "1000:1000"), ("WORKDIR", "/opt/raycomplete"), ("COPY", "--chown=1000:1000 . .")}
    assert owned <= set(found[:place])
    assert all(word != "USER" for word, _ in found[place:])
    assert any(word == "ENV" and "/opt/raycomplete/.venv/bin:$PATH" in rest for word, rest in found[place:])
    assert f"docker build -f {path.relative_to(ROOT)} " in text
    assert re.search(rf"raycomplete:{re.escape(__version__)}-", text)


def test_the_cluster_file_is_one_of_ray() -> None:
    cluster: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    util = pytest.importorskip("ray.autoscaler._private.util", reason="private to Ray, may move")
    util.validate_config(util.prepare_config(cluster))
    with pytest.raises(Exception, match="max_worker"):
        util.validate_config(util.prepare_config({**cluster, "max_worker": 1}))
    groups = dict(cluster["available_node_types"])
    head = groups.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}  # no run fits there, so each waits for a GPU
    assert groups
    assert all(group["resources"]["GPU"] >= 1 for group in groups.values())
    assert sum(group["max_workers"] for group in groups.values()) == cluster["max_workers"]
    assert sum(group["min_workers"] for group in groups.values()) >= 1
    assert "." in cluster["file_mounts"].values()
    assert any("make setup" in command for command in cluster["setup_commands"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in cluster[key][-1]
        assert "--metrics-export-port=8080" in cluster[key][-1]
    head = cluster["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert f"RAY_JOB_STOP_WAIT_TIME_S={STOP_WAIT_S:g}" in head  # time for a checkpoint
    (mount,) = (command for command in cluster["setup_commands"] if " mount " in command)
    assert "mountpoint -q /shared ||" in mount  # set-up runs again at every `ray up`
    assert "nfs-common" in cluster["setup_commands"][0]
