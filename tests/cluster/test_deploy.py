"""The files of cluster/deploy: what they start, what they refer to, and that all of them agree."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private import utils as ray_utils

from launch.commands.pretrain import parse_config
from tests.source_tree import LAYERS, ROOT
from trainer.checks import check

DEPLOY = ROOT / "cluster" / "deploy"
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
MANIFESTS = ("raycluster", "rayjob", "runs-volume")
RAY = re.search(r"^ray==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]


def manifest(name: str) -> dict:
    return yaml.safe_load((DEPLOY / "kuberay" / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> dict:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict]:
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def grail_lines(path: Path) -> list[list[str]]:
    """The words behind `grail pretrain` of the commands in the head comment and the entry point of a file."""
    text = path.read_text()
    comment = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    commands = [comment, yaml.safe_load(text).get("spec", {}).get("entrypoint", "")]
    joined = " ".join(commands).replace("\\", " ").replace("\n", " ")
    return [shlex.split(line) for line in re.findall(r"grail\s+pretrain\s+([^&'\"|]+)", joined)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_the_fields_that_kubernetes_knows(name):
    jsonschema.validate(manifest(name), SCHEMA)


def test_a_misspelt_field_would_be_found():
    wrong = manifest("rayjob")
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_pods_hold_what_a_training_needs(name):
    assert cluster_spec(name)["rayVersion"] == RAY
    for pod in pods(name):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert (
            mounts["/runs"]["persistentVolumeClaim"]["claimName"]
            == manifest("runs-volume")["metadata"]["name"]
        )
        assert container["readinessProbe"] and container["livenessProbe"]
        (command,) = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (ROOT / Path(command).relative_to("/opt/grail")).stat().st_mode & 0o111
        assert pod["terminationGracePeriodSeconds"] >= 120
        assert container["resources"]["requests"] == container["resources"]["limits"]
    head, worker = (pod["containers"][0] for pod in pods(name))
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) > 0
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_ray_keeps_the_objects_of_a_pod_in_its_shared_memory(name, monkeypatch):
    for pod in pods(name):
        (shared,) = (volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
        memory = pod["containers"][0]["resources"]["limits"]["memory"]
        shared_bytes, own_bytes = (
            int(size.removesuffix("Gi")) << 30 for size in (shared["sizeLimit"], memory)
        )
        monkeypatch.setattr(ray_utils, "get_shared_memory_bytes", lambda size=shared_bytes: size)
        assert ray_utils.resolve_object_store_memory(own_bytes) <= shared_bytes


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_every_container_has_the_token_from_the_secret(name):
    containers = [container for pod in pods(name) for container in pod["containers"]]
    submitter = manifest(name)["spec"].get("submitterPodTemplate")
    containers += submitter["spec"]["containers"] if submitter else []
    for container in containers:
        variables = {entry["name"]: entry for entry in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        secret = variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": "grail-ray-token", "key": "auth_token"}
    text = (DEPLOY / "kuberay" / f"{name}.yaml").read_text()
    assert "create secret generic grail-ray-token --from-literal=auth_token=" in text


@pytest.mark.parametrize("name", ["ray-on-premise", "ray-cloud"])
def test_cluster_files_pass_the_validator_of_ray(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1] and "env --block-signal=TERM" in commands[-1]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert sum(kind.get("min_workers", 0) for kind in prepared["available_node_types"].values()) >= 2


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_commands_that_are_shown_are_right(path):
    lines = grail_lines(path)
    assert bool(lines) == (path.stem != "runs-volume")
    for line in lines:
        config = parse_config(line[0], line[1:])
        check(config)
        assert config.cluster.address == "auto"


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, its arguments) of every line, continued ones joined."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def test_the_dockerfile_copies_what_there_is_and_all_that_is_needed():
    copied = {name for kind, rest in dockerfile() if kind == "COPY" for name in rest.split()[:-1]}
    assert {*LAYERS, "setup.sh", "requirements.txt"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept, ".dockerignore must let in what is copied, and nothing else"


def test_the_dockerfile_makes_images_for_both_kinds_of_machines():
    lines = dockerfile()
    kinds = [kind for kind, _ in lines]
    assert kinds[0] == "ARG" and lines[1] == ("FROM", "${BASE}")
    default = lines[0][1].partition("=")[2]
    assert re.fullmatch(r"python:3\.1[12]-slim-\w+", default)
    shown = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"--build-arg BASE=nvidia/cuda:\S+-ubuntu24\.04 --build-arg GRAIL_FBGEMM=cuda", shown), (
        "that release has Python 3.12, which setup.sh takes"
    )
    arguments = {rest.partition("=")[0] for kind, rest in lines if kind == "ARG"}
    assert {"BASE", "GRAIL_FBGEMM"} <= arguments
    commands = [rest for kind, rest in lines if kind == "RUN"]
    assert any(
        "./setup.sh" in command and "ray[default]==$(sed -n 's/^ray==//p'" in command for command in commands
    )
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)
    assert kinds[-1] == "WORKDIR" and ("USER", "1000") in lines, "not as root"


def test_a_pod_ends_only_when_its_command_and_workers_have_saved(tmp_path):
    """In a space of process ids of its own, since the script asks all processes it sees."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare for a pod's own process ids")
    saves = "trap 'sleep 1; exit' TERM; while :; do sleep 0.1; done"
    (tmp_path / "grail").write_text(saves)
    script = f"""
        (exec -a ray::GangWorker.poll bash -c "{saves}") &
        (exec -a /opt/python3.12 bash {tmp_path}/grail align x) & align=$!
        bash -c "sleep 20; grail pretrain sasrec" & shell=$!
        sleep 0.3
        bash {DEPLOY}/pre-stop.sh
        kill -0 $align 2>/dev/null && echo the command runs
        kill $shell && echo its shell is left alone
    """
    begun = time.monotonic()
    ended = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 0 and ended.stdout == "its shell is left alone\n", ended
    assert time.monotonic() - begun > 1.0, "it waits for the save"


def test_what_a_cloud_host_sets_up_lies_in_the_home_of_its_user():
    config = yaml.safe_load((DEPLOY / "ray-cloud.yaml").read_text())
    assert all(place.startswith("~/") for place in config["file_mounts"])
    assert config["setup_commands"] == ["cd ~/grail && ./setup.sh"]
