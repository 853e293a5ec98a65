"""The manifests, checked against the published schemas, this project's commands, and each other."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cvt.architecture import PRESETS, Architecture, count_macs
from jobs.cli import make_app
from jobs.console import add_command
from pipeline.config import Config, load_config
from pipeline.dataflow import ClusterCapacity, ResourceRequest, Resources, choose_resources
from pipeline.schedule import Submission
from tests.configs.crds import kuberay_validator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "kubernetes"
Json = dict[str, Any]
MANIFESTS: dict[str, list[Json]] = {
    path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))
}
DOCUMENTS = [(name, document) for name, documents in MANIFESTS.items() for document in documents]
CLUSTERS: dict[str, Json] = {
    "rayjob.yaml": MANIFESTS["rayjob.yaml"][0]["spec"]["rayClusterSpec"],
    "raycluster.yaml": MANIFESTS["raycluster.yaml"][0]["spec"],
}
CLUSTER = CLUSTERS["raycluster.yaml"]
CRON = MANIFESTS["cronjob.yaml"][0]["spec"]
CRON_POD = CRON["jobTemplate"]["spec"]["template"]["spec"]
INDEXED = MANIFESTS["indexedjob.yaml"][0]["spec"]
INDEXED_POD = INDEXED["template"]["spec"]
#: Mappings with arbitrary keys: names of labels, files, resources and parameters.
FREE = {"annotations", "labels", "data", "nodeSelector", "requests", "limits", "rayStartParams"}
FREE |= {"matchLabels"}
KUBERNETES = "1.37"


# Against the published schemas ------------------------------------------------------------------


@cache
def monitor_validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(yaml.safe_load((Path(__file__).parent / "podmonitor.yaml").read_text()))


def schema_errors(document: Json) -> list[str]:
    """Returns the errors of a document by the schema of its kind."""
    if document["apiVersion"] == "monitoring.coreos.com/v1":
        return [error.message for error in monitor_validator().iter_errors(document)]
    found = []
    if document["apiVersion"] == "ray.io/v1":
        found = [error.message for error in kuberay_validator(document["kind"]).iter_errors(document)]
        # Kubernetes itself defines the metadata.
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.get("metadata", {})}
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        found.append(error.message)
    return found


def mappings(value: Any) -> Iterator[Json]:
    """Yields the mappings in a document whose keys a schema defines."""
    if isinstance(value, dict):
        yield value
        for name, each in value.items():
            if name not in FREE:
                yield from mappings(each)
    elif isinstance(value, list):
        for each in value:
            yield from mappings(each)


@pytest.fixture
def _schemas() -> None:
    pytest.importorskip("kubernetes_validate", reason="the schemas of Kubernetes are not installed")


@pytest.mark.usefixtures("_schemas")
@pytest.mark.parametrize(
    "document", [d for _, d in DOCUMENTS], ids=[f"{n} {d['kind']}" for n, d in DOCUMENTS]
)
def test_every_manifest_is_valid(document: Json) -> None:
    assert schema_errors(document) == []


@pytest.mark.slow
@pytest.mark.usefixtures("_schemas")
@pytest.mark.parametrize(
    "name",
    [
        "rayjob.yaml",
        "cronjob.yaml",
        "access.yaml",
        "config.yaml",
        "indexedjob.yaml",
        "podmonitor.yaml",
        "protection.yaml",
    ],
)
def test_misspelled_field_is_rejected_at_every_level(name: str) -> None:
    document = copy.deepcopy(MANIFESTS[name][0])
    checked = 0
    for mapping in mappings(document):
        for field in list(mapping):
            if field in ("kind", "apiVersion") and mapping is document:
                continue  # they select the schema
            mapping[f"{field}s"] = mapping.pop(field)
            assert schema_errors(document), f"{field}s"
            mapping[field] = mapping.pop(f"{field}s")
            checked += 1
    assert schema_errors(document) == []
    few = {"access.yaml": 2, "config.yaml": 2, "podmonitor.yaml": 8, "protection.yaml": 14}
    assert checked > few.get(name, 50)


@pytest.mark.usefixtures("_schemas")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimit", "2"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "8"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams.num-cpus", 8),
        ("spec.rayClusterSpec.autoscalerOptions.upscalingMode", "Fast"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.value", 1),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriodSeconds", "60s"),
    ],
)
def test_value_of_wrong_type_is_rejected(path: str, value: object) -> None:
    document: Any = copy.deepcopy(MANIFESTS["rayjob.yaml"][0])
    *before, last = path.split(".")
    place = document
    for part in before:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = value
    assert len(schema_errors(document)) == 1


# Against this project's commands and configuration ----------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Config:
    """The configuration that is mounted in the pods."""
    (name,) = MANIFESTS["config.yaml"][0]["data"]
    path = tmp_path / name
    path.write_text(MANIFESTS["config.yaml"][0]["data"][name])
    return load_config(Config, path)


def commands() -> dict[str, str]:
    """Returns the command lines in the manifests that run this project."""
    return {
        "rayjob.yaml": MANIFESTS["rayjob.yaml"][0]["spec"]["entrypoint"],
        "cronjob.yaml": CRON_POD["containers"][0]["command"][2].partition("||")[0],
        "indexedjob.yaml": INDEXED_POD["containers"][0]["command"][2].replace(
            "$((JOB_COMPLETION_INDEX + 1))", "1"
        ),
    }


def pods() -> dict[str, Json]:
    """Returns the specifications of all pods, by manifest and group."""
    found = {"cronjob.yaml submit": CRON_POD, "indexedjob.yaml gpu": INDEXED_POD}
    for name, cluster in CLUSTERS.items():
        found[f"{name} head"] = cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            found[f"{name} {group['groupName']}"] = group["template"]["spec"]
    return found


@pytest.mark.parametrize("name", commands())
def test_command_lines_parse_and_name_the_mounted_file(name: str) -> None:
    words = [word for word in shlex.split(commands()[name]) if word != "exec"]
    python, option, module, *arguments = words
    assert (python, option) == ("python", "-m")
    command = "label" if module == "jobs.label" else arguments.pop(0)
    assert module in ("jobs.label", "jobs.cli")
    app = make_app()
    add_command(app, getattr(importlib.import_module(f"jobs.{command}"), command))
    parsed = typer.main.get_command(app).make_context(command, arguments).params
    (file,) = MANIFESTS["config.yaml"][0]["data"]
    assert str(parsed["config"]) == f"/etc/cvt-label/{file}"
    with pytest.raises(Exception, match="No such option"):
        typer.main.get_command(app).make_context(command, [*arguments, "--no-such-option"])


def test_job_name_of_the_cronjob_is_a_valid_idempotency_key() -> None:
    job = f"{MANIFESTS['cronjob.yaml'][0]['metadata']['name']}-29384720"  # minutes since 1970
    config = load_config(Config, None, ["input.uri=/in", "output.uri=/out", "model.path=fashion-mnist"])
    assert Submission(config, job).id.endswith(job)


def shown(command: str, index: int) -> list[str]:
    """Returns the words of a command, as a shell expands them."""
    environment = {"JOB_COMPLETION_INDEX": str(index), "SLURM_ARRAY_TASK_ID": str(index)}
    echo = re.sub("^exec", "printf '%s\\n'", command, flags=re.M)
    done = subprocess.run(
        ["/bin/sh", "-c", echo], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")


def test_pods_of_the_indexed_job_label_every_share_once() -> None:
    command, count = INDEXED_POD["containers"][0]["command"][2], INDEXED["completions"]
    shares = [shown(command, index)[-2] for index in range(count)]  # an empty line is last
    assert shares == [f"run.share={index}/{count}" for index in range(1, count + 1)]
    assert "--wait" in command


def test_commands_of_the_docs_label_every_share_once() -> None:
    page = (ROOT / "docs/how-to/divide.md").read_text()
    (slurm,) = re.findall(r"^#SBATCH --array=1-(\d+)$", page, re.M)
    (command,) = re.findall(r"^exec .*$", page, re.M)
    shares = [shown(command, index)[-2] for index in range(1, int(slurm) + 1)]
    assert shares == [f"run.share={index}/{slurm}" for index in range(1, int(slurm) + 1)]
    (count, edit) = re.findall(r"seq (\d+)\); do\n  (sed .*rayjob\.yaml)", page)[0]
    loop = f"for i in $(seq {count}); do {edit}; done"
    done = subprocess.run(["/bin/sh", "-c", loop], cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.findall(r"^  entrypoint: .* --wait --set (run\.share=\S+)$", done.stdout, re.M)
    assert found == [f"run.share={index}/{count}" for index in range(1, int(count) + 1)]


def test_only_overlapping_attempts_wait_for_each_other() -> None:
    assert "--wait" in commands()["rayjob.yaml"]
    assert MANIFESTS["rayjob.yaml"][0]["spec"]["backoffLimit"] > 0
    assert "--wait" not in commands()["cronjob.yaml"]
    assert CRON["concurrencyPolicy"] == "Forbid"
    assert CRON["startingDeadlineSeconds"] > 0


def test_all_clusters_are_equal() -> None:
    assert CLUSTERS["rayjob.yaml"] == CLUSTERS["raycluster.yaml"]


def test_head_waits_longer_than_a_stopped_job_needs(job: Config) -> None:
    head = CLUSTER["headGroupSpec"]["template"]["spec"]
    environment = {each["name"]: each.get("value") for each in head["containers"][0]["env"]}
    stop_wait = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert job.run.grace_period_s + 30 <= stop_wait < head["terminationGracePeriodSeconds"]
    assert head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2].endswith("ray stop")


@pytest.mark.parametrize("group", CLUSTER["workerGroupSpecs"], ids=lambda group: group["groupName"])
def test_worker_that_stops_announces_its_end_to_ray(group: Json) -> None:
    from ray.scripts.scripts import cli

    pod = group["template"]["spec"]
    script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    drain, rest = script.split(" && ")
    words = shlex.split(drain)
    assert words[:2] == ["ray", "drain-node"]
    options = cli.commands["drain-node"].make_context("drain-node", words[2:]).params
    wait = re.fullmatch(r"sleep (\d+); ray stop", rest)
    assert wait is not None
    # Ray keeps the node until its deadline, and Kubernetes leaves time to stop Ray.
    assert int(wait[1]) < options["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]


def test_versions_match_the_image() -> None:
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    images = {c["image"] for pod in pods().values() for c in pod["containers"]}
    assert CLUSTER["rayVersion"] == ray
    assert images == {f"registry.example.com/cvt-label:{project['project']['version']}"}


def test_image_copies_every_installed_package() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]
    packages = {pattern.removesuffix("*") for pattern in found["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    (extras,) = re.findall(r"'\.\[(.*)\]'", "\n".join(lines))
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    python = lines[[line.startswith("FROM") for line in lines].index(True)].split(":")[1]
    version = python.partition("-")[0]
    assert f"Programming Language :: Python :: {version}" in project["project"]["classifiers"]


def test_objects_named_by_the_manifests_exist() -> None:
    accounts = {document["metadata"]["name"] for document in MANIFESTS["access.yaml"]}
    (config,) = MANIFESTS["config.yaml"]
    cluster = MANIFESTS["raycluster.yaml"][0]["metadata"]["name"]
    for pod in pods().values():
        assert pod.get("serviceAccountName", "cvt-label") in accounts
        for volume in pod["volumes"]:
            assert (
                volume.get("configMap", {"name": config["metadata"]["name"]})["name"]
                == config["metadata"]["name"]
            )
        mounted = {m["name"]: m["mountPath"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert mounted.get("config", "/etc/cvt-label") == "/etc/cvt-label"
    assert f"http://{cluster}-head-svc:8265" in commands()["cronjob.yaml"]
    token = {each["name"]: each for each in CRON_POD["containers"][0]["env"]}["RAY_AUTH_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}
    assert CLUSTER["authOptions"]["mode"] == "token"


def test_network_policy_admits_ray_submitters_operator_and_prometheus() -> None:
    network = MANIFESTS["protection.yaml"][0]
    ray, jobs, metrics = network["spec"]["ingress"]
    assert network["spec"]["podSelector"] == ray["from"][0]["podSelector"]
    submitters = jobs["from"][0]["podSelector"]["matchLabels"].items()
    for template in (
        CRON["jobTemplate"]["spec"]["template"],
        MANIFESTS["rayjob.yaml"][0]["spec"]["submitterPodTemplate"],
    ):
        assert template["metadata"]["labels"].items() >= submitters
    opened = [port["port"] for rule in (jobs, metrics) for port in rule["ports"]]
    ports = {p["name"]: p["containerPort"] for p in pods()["rayjob.yaml head"]["containers"][0]["ports"]}
    assert opened == [ports["dashboard"], ports["metrics"]]


def test_budget_protects_all_heads_without_the_scale_subresource() -> None:
    """Kubernetes never evicts a pod whose controller lacks this subresource, if its budget needs it."""
    _, *budgets = MANIFESTS["protection.yaml"]
    assert [budget["spec"]["selector"]["matchLabels"] for budget in budgets] == [{"ray.io/node-type": "head"}]
    assert isinstance(budgets[0]["spec"]["minAvailable"], int)
    assert "maxUnavailable" not in budgets[0]["spec"]


def test_cluster_is_deleted_after_each_outcome() -> None:
    rules = MANIFESTS["rayjob.yaml"][0]["spec"]["deletionStrategy"]["deletionRules"]
    seconds = {
        condition.get("jobStatus") or condition["jobDeploymentStatus"]: condition["ttlSeconds"]
        for rule in rules
        if rule["policy"] == "DeleteCluster"
        for condition in [rule["condition"]]
    }
    assert set(seconds) == {"SUCCEEDED", "FAILED", "Failed"}
    assert seconds["SUCCEEDED"] < seconds["FAILED"] == seconds["Failed"]


@pytest.mark.usefixtures("_schemas")
def test_documented_job_in_a_queue_is_valid() -> None:
    found = re.search(
        r"```yaml\n(metadata:\n  labels: {kueue.*?)```",
        (ROOT / "docs/how-to/kubernetes.md").read_text(),
        re.S,
    )
    assert found is not None
    patch, job = yaml.safe_load(found[1]), copy.deepcopy(MANIFESTS["rayjob.yaml"][0])
    job["metadata"] |= patch["metadata"]
    cluster = job["spec"]["rayClusterSpec"] | patch["spec"].pop("rayClusterSpec")
    job["spec"] |= patch["spec"] | {"rayClusterSpec": cluster}
    del job["spec"]["deletionStrategy"], cluster["autoscalerOptions"]
    assert schema_errors(job) == []


def test_prometheus_scrapes_the_metrics_port_of_the_head() -> None:
    (monitor,) = MANIFESTS["podmonitor.yaml"]
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    head, *workers = (
        group["template"]["spec"]["containers"][0]
        for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])
    )
    assert {"name": endpoint["port"], "containerPort": 8080} in head[
        "ports"
    ]  # Ray's port by KubeRay's default
    assert all("metrics-export-port" not in group["rayStartParams"] for group in CLUSTER["workerGroupSpecs"])
    assert not any("ports" in worker for worker in workers)  # so KubeRay adds the port
    interval, timeout = (int(endpoint[name].removesuffix("s")) for name in ("interval", "scrapeTimeout"))
    assert 10 <= timeout <= interval <= 30


def pod(port: str, **labels: str) -> Json:
    """Returns a pod's port in the format of Prometheus's service discovery for Kubernetes."""
    meta = {"namespace": "default", "pod_name": "p", "pod_container_port_name": port}
    meta |= {f"pod_label_{name}": value for name, value in labels.items()}
    return {
        "targets": ["127.0.0.1:9"],
        "labels": {f"__meta_kubernetes_{name}": value for name, value in meta.items()},
    }


def test_prometheus_without_operator_selects_the_same_pods(tmp_path: Path) -> None:
    """The configuration in the docs, with given pods: not every build of Prometheus can discover pods."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    found = re.search(
        r"```yaml\n(scrape_configs:.*?)```", (ROOT / "docs/how-to/kubernetes.md").read_text(), re.S
    )
    assert found is not None
    config = yaml.safe_load(found[1])
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    ray = {"ray_io_is_ray_node": "yes", "ray_io_cluster": "c", "ray_io_node_type": "head"}
    job["static_configs"] = [pod("metrics", **ray), pod("gcs", **ray), pod("metrics", app="other")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([binary, *options], cwd=tmp_path, stdout=log, stderr=log)
    try:
        targets = wait_for_targets(f"http://{address}/api/v1/targets")
    finally:
        process.terminate()
        process.wait(30)
    assert len(targets["droppedTargets"]) == 2
    (kept,) = targets["activeTargets"]
    labels = {"namespace": "default", "pod": "p", "ray_io_cluster": "c", "ray_io_node_type": "head"}
    assert kept["labels"] == labels | {"job": "ray", "instance": "127.0.0.1:9"}


def wait_for_targets(url: str, timeout: float = 120) -> Json:
    """Returns the answer of Prometheus as soon as it has active targets."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                data = dict(json.load(answer)["data"])
        except OSError:  # not started yet
            continue
        if data["activeTargets"]:
            return data
    raise TimeoutError(url)


@pytest.mark.parametrize("name", [*pods(), "rayjob.yaml submit"])
def test_pods_have_no_keys_and_minimal_rights(name: str) -> None:
    submitter = MANIFESTS["rayjob.yaml"][0]["spec"]["submitterPodTemplate"]["spec"]
    pod = pods().get(name, submitter)
    for container in pod["containers"]:
        for variable in container.get("env", ()):
            is_secret = re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"])
            assert not (is_secret and "value" in variable), variable["name"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        for amounts in container["resources"].values():
            assert amounts.keys() >= {"memory", "ephemeral-storage"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.get("automountServiceAccountToken") is False or name.endswith("head")  # for the autoscaler


def test_workers_have_another_cloud_role_than_the_head() -> None:
    roles = {
        account["metadata"]["name"]: account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for account in MANIFESTS["access.yaml"]
    }
    assert {name: role.rpartition("/")[2] for name, role in roles.items()} == {name: name for name in roles}
    for group in CLUSTER["workerGroupSpecs"]:
        assert group["template"]["spec"]["serviceAccountName"] == "cvt-label-worker"


# Against the resources that a job requests ---------------------------------------------------------

UNITS = {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "": 1}


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([KMG]i)?", text).groups("")  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def node(group: Json) -> dict[str, float]:
    """Returns the resources that Ray sees in a pod of a group."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {
        "cpus": float(group["rayStartParams"].get("num-cpus", limits["cpu"])),
        "gpus": float(limits.get("nvidia.com/gpu", 0)),
        "memory": quantity(limits["memory"]),
        "object_store": float(group["rayStartParams"]["object-store-memory"]),
    }


def cluster_of(bound: str) -> ClusterCapacity:
    """Returns the cluster at its minimum (`minReplicas`) or maximum (`maxReplicas`) size."""
    nodes = [node(CLUSTER["headGroupSpec"])]
    for group in CLUSTER["workerGroupSpecs"]:
        nodes += [node(group)] * group[bound]
    return ClusterCapacity(
        cpus=sum(each["cpus"] for each in nodes),
        gpus=sum(each["gpus"] for each in nodes),
        node_cpus=max(each["cpus"] for each in nodes),
        node_memory=min(each["memory"] for each in nodes),
    )


def chosen(job: Config, cluster: ClusterCapacity) -> Resources:
    macs = count_macs(Architecture(**PRESETS["cvt-13"]), 1000, 224)
    return choose_resources(ResourceRequest(job.read, job.decode, job.classify, 224, macs), cluster)


def test_resources_do_not_depend_on_the_cluster_size_at_start(job: Config) -> None:
    smallest, largest = cluster_of("minReplicas"), cluster_of("maxReplicas")
    assert (smallest.cpus, smallest.gpus) == (0, 0)
    at_start, later = chosen(job, smallest), chosen(job, largest)
    # The number of decoders is only reported: Ray starts as many as fit. Classifiers start with their nodes.
    assert replace(at_start, decoders=later.decoders, initial_actors=4) == later
    assert at_start.initial_actors == 1


def test_stages_fit_into_the_largest_cluster(job: Config) -> None:
    largest = cluster_of("maxReplicas")
    resources = chosen(job, largest)
    groups = {
        group["groupName"]: (node(group), group["maxReplicas"]) for group in CLUSTER["workerGroupSpecs"]
    }
    assert resources.device == "cuda"
    assert resources.max_actors * resources.classify_gpus == largest.gpus
    assert resources.chunk_images == 1024
    gpu, _ = groups["gpu"]
    assert (
        gpu["gpus"] // resources.classify_gpus * resources.classify_cpus < gpu["cpus"]
    )  # the other CPUs decode
    cpu, max_replicas = groups["cpu"]
    assert resources.readers * job.read.num_cpus + resources.decode_cpus <= cpu["cpus"] * max_replicas
    for each, _ in groups.values():  # one node alone can run one slot of each stage
        assert (
            resources.readers * job.read.num_cpus + resources.decode_cpus + resources.classify_cpus
            <= each["cpus"]
        )


def test_memory_of_a_node_fits_its_tasks_and_object_store(job: Config) -> None:
    resources = chosen(job, cluster_of("maxReplicas"))
    for group in CLUSTER["workerGroupSpecs"]:
        each = node(group)
        decoding = each["cpus"] / resources.decode_cpus * resources.decode_memory
        reading = resources.readers * resources.read_memory
        assert decoding + reading + each["object_store"] < each["memory"], group["groupName"]
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        shm = volumes["shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        assert node(group)["object_store"] < quantity(shm["sizeLimit"]) < node(group)["memory"] / 2


def test_only_head_is_on_demand_and_only_gpu_workers_request_gpus() -> None:
    capacity = {name: pod.get("nodeSelector") for name, pod in pods().items()}
    assert capacity["rayjob.yaml head"] == {"karpenter.sh/capacity-type": "on-demand"}
    for name in ("rayjob.yaml cpu", "rayjob.yaml gpu"):
        assert capacity[name] == {"karpenter.sh/capacity-type": "spot"}
        assert {each["key"] for each in pods()[name]["tolerations"]} >= {"karpenter.sh/capacity-type"}
    with_gpu = {name for name in pods() if "nvidia.com/gpu" in str(pods()[name]["containers"])}
    assert with_gpu == {f"{name} gpu" for name in [*CLUSTERS, "indexedjob.yaml"]}
    for name in with_gpu:
        assert "nvidia.com/gpu" in {each["key"] for each in pods()[name]["tolerations"]}
