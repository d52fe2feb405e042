"""KubeRay's resources and `ray up`'s configuration from recipes: valid by their own schemas, and large enough."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from raylign.cluster.errors import DoesNotFit, InputError
from raylign.cluster.manifests.groups import Group
from raylign.trainers.manifests import Options, manifests
from raylign.trainers.recipe import load_recipe
from raylign.trainers.sizing import Shape, groups_of

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes/quickstart.yaml"


@pytest.fixture(scope="session")
def crds(shared_data_folder: Path) -> dict[str, dict[str, Any]]:
    """The `ray.io/v1` schemas by kind, which refuse what they do not name, as strict validation does."""
    found = {}
    for path in (shared_data_folder / "kuberay").glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[crd["spec"]["names"]["kind"]] = _strict(schema)
    return found


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="session")
def shared_data_folder() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "kuberay").is_dir():
        pytest.skip(f"KubeRay's definitions are not here: {folder} is absent")
    return folder


def _pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.yaml")))
def test_what_is_made_of_a_recipe_is_valid(crds: dict[str, dict[str, Any]], recipe: str) -> None:
    options = Options(secrets=("WANDB_API_KEY=wandb:key",), namespace="ml", max_hours=12)
    path = ROOT / "recipes" / recipe
    mounted = {"model": "model.path=/storage/base", "teacher": "stages.0.teacher.path=/storage/teacher"}
    overrides = [
        text for key, text in mounted.items() if f"{key}:" in path.read_text() and "prepare:" not in path.read_text()
    ]
    kinds = ["cluster", "job", *(["service"] if load_recipe(path, overrides).serve else [])]
    made = [manifest for kind in kinds for manifest in manifests(path, overrides, kind, options)]
    assert {"RayCluster", "RayJob"} <= {m["kind"] for m in made} <= {"RayCluster", "RayJob", "RayService", "ConfigMap"}
    for manifest in made:
        if manifest["kind"] in crds:
            jsonschema.validate(manifest, crds[manifest["kind"]])


def test_the_schema_would_see_a_mistake(crds: dict[str, dict[str, Any]]) -> None:
    (cluster,) = manifests(QUICKSTART, [], "cluster", Options())
    for wrong in (
        {"authOptions": {"mode": "tokens"}},
        {"workerGroupSpec": []},
        {"workerGroupSpecs": [{"groupName": "cpu"}]},
        {"enableInTreeAutoscaling": "yes"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(cluster | {"spec": cluster["spec"] | wrong}, crds["RayCluster"])


def test_a_job_has_its_recipe_a_token_storage_limits_and_no_privilege() -> None:
    options = Options(image="registry.example/raylign:1", secrets=("HF_TOKEN=hub:token",), max_hours=2, claim="runs")
    texts, job = manifests(QUICKSTART, ["seed=3"], "job", options)
    assert set(texts["data"]) == {"quickstart.yaml", "quickstart__sums.py"}
    assert texts["data"]["quickstart.yaml"] == QUICKSTART.read_text()
    spec = job["spec"]
    assert spec["entrypoint"] == (
        "raylign run /etc/raylign/recipe/quickstart.yaml --name quickstart --storage /storage --resume --set seed=3 "
        '--address "$RAY_ADDRESS" --max-hours 2'
    )
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (7800, 3, True)
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in _pods(cluster):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["env"] == [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
        ]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"name": "storage", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
        assert {m["mountPath"] for m in container["volumeMounts"]} == {"/storage", "/dev/shm", "/etc/raylign/recipe"}


def test_groups_hold_each_stage_and_rollout_workers_come_and_go(tmp_path: Path) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text(
        "name: large\nmodel: {path: /storage/base}\nstages:\n"
        "  - {type: sft, adapter: {type: lora}, data: {path: /storage/a.jsonl}, workers: 12, batch_size: 96, "
        "resources: {cpus: 8, gpus: 1}}\n"
        "  - {type: grpo, data: {path: /storage/b.jsonl}, batch_size: 64, "
        "rewards: [{type: length, max_tokens: 9, buffer: 3}], policy: {ranks: 8, cpus: 8, gpus: 1}, "
        "scoring: {workers: 4},\n"
        "     rollout: {workers: {min: 2, max: 24, start: 8}, resources: {cpus: 8, gpus: 1}}}\n"
    )
    config = load_recipe(recipe)
    assert groups_of(config) == [
        Group(name="gpu", cpus=49, gpus=8, memory_gb=196, least=2, most=2),
        Group(name="cpu", cpus=2, memory_gb=8, least=1, most=1),
        Group(name="rollout", cpus=8, gpus=1, memory_gb=32, least=0, most=24),
    ]
    with pytest.raises(DoesNotFit):
        groups_of(load_recipe(recipe, ["stages.0.resources.gpus=4"]), Shape(gpus=2))


def test_ray_up_is_what_ray_takes(tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    machines = ("head=m5.xlarge", "cpu=m5.4xlarge", "rollout=m5.large")
    aws = Options(region="eu-west-1", machines=machines, spot=("rollout",))
    gcp = Options(region="europe-west4", project="p", machines=machines)
    for kind, options in (("aws", aws), ("gcp", gcp), ("hosts", Options(hosts=("10.0.0.1", "10.0.0.2")))):
        (config,) = manifests(QUICKSTART, [], kind, options)
        validate_config(prepare_config(json.loads(json.dumps(config))))
    (config,) = manifests(QUICKSTART, [], "aws", aws)
    nodes = config["available_node_types"]
    assert nodes["rollout"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in nodes["cpu"]["node_config"]
    assert (nodes["rollout"]["min_workers"], nodes["rollout"]["max_workers"]) == (0, 4)
    assert all("RAY_AUTH_MODE=token" in config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker"))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("aws", Options(region="x"), "no machines for head: give --machine head=TYPE"),
        ("aws", Options(machines=("head=a", "cpu=b", "rollout=c")), "aws needs --region"),
        ("aws", Options(machines=("head",)), "needs the form GROUP=TYPE"),
        ("hosts", Options(), "give --hosts"),
        ("job", Options(secrets=("KEY=value",)), "VARIABLE=SECRET:KEY"),
        ("job", Options(name="Big_Name"), "small letters"),
    ],
)
def test_what_is_missing_is_said(kind: str, options: Options, said: str) -> None:
    with pytest.raises(InputError, match=said):
        manifests(QUICKSTART, [], kind, options)


def test_paths_that_pods_do_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path is /elsewhere/m, which pods do not have"):
        manifests(ROOT / "recipes/dpo.yaml", ["model.path=/elsewhere/m"], "job", Options())


def test_the_command_prints_it_or_gives_it_to_kubectl(tmp_path: Path) -> None:
    def up(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "raylign.cli", "up", "--recipe", str(QUICKSTART), *arguments]
        environment = {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    printed = up("--kuberay", "--print")
    texts, job = yaml.safe_load_all(printed.stdout)
    assert (printed.returncode, texts["kind"], job["kind"]) == (0, "ConfigMap", "RayJob")
    assert json.loads(up("--kuberay", "--json").stdout) == [texts, job]
    assert (up("--kuberay").returncode, "kubectl is not installed here" in up("--kuberay").stderr) == (2, True)
    fake = tmp_path / "kubectl"
    fake.write_text("#!/bin/sh\n/bin/cat > given\necho applied\n")
    fake.chmod(0o755)
    applied = subprocess.run(
        [sys.executable, "-m", "raylign.cli", "up", "--kuberay", "--recipe", str(QUICKSTART)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        timeout=60,
    )
    assert applied.stdout == "applied\n"
    assert list(yaml.safe_load_all((tmp_path / "given").read_text())) == [texts, job]
