"""KubeRay's RayCluster, RayJob and RayService (`ray.io/v1`, KubeRay 1.5 and later) as plain objects.

The head runs the controllers and offers nothing to actors, so that no worker's memory ends them. Ray asks for the
token of a Secret; keys for others come from Secrets, too, and no value of one stands in a manifest. What a pod requests
it may use and no more, and it runs as a user without privileges.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .groups import Group

Manifest = dict[str, Any]

_API = "ray.io/v1"
STORAGE = "/storage"
"""Where pods have the volume of runs."""

_RECIPE = "/etc/raylign/recipe"
_GRACE_SECONDS = 300
"""How long a pod that is told to go has: a run writes its checkpoint meanwhile."""
_IDLE_SECONDS = 120
_RETRIES = 3
_HEAD = {"cpu": "4", "memory": "16Gi"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is the cluster's own and in no recipe."""

    image: str
    storage_claim: str
    """A PersistentVolumeClaim that many pods may write; it is mounted at `STORAGE` in all of them."""
    token_secret: str = "ray-token"
    """A Secret whose key `auth_token` is Ray's token."""
    secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Environment variables by name: the Secret and its key."""
    namespace: str | None = None
    ray_version: str


def ray_cluster(name: str, groups: Sequence[Group], site: Site) -> Manifest:
    """A RayCluster with a head and these groups, which grow and shrink with what runs ask for."""
    return _resource("RayCluster", name, site, _cluster(groups, site))


def ray_job(
    name: str,
    groups: Sequence[Group],
    site: Site,
    *,
    recipe: str,
    files: Mapping[str, str],
    overrides: Sequence[str] = (),
    max_hours: float | None = None,
) -> list[Manifest]:
    """A ConfigMap with the recipe's folder and a RayJob that runs it, with the cluster for as long as that takes.

    Where the whole cluster is lost, KubeRay makes another and the run goes on from its last checkpoint. `files` are by
    their path in the folder, `recipe` one of them.
    """
    mount = {"name": "recipe", "configMap": {"name": f"{name}-recipe", "items": _items(files)}}
    sets = [part for override in overrides for part in ("--set", override)]
    command = ["raylign", "run", f"{_RECIPE}/{recipe}", "--name", name, "--storage", STORAGE, "--resume", *sets]
    spec: dict[str, Any] = {
        "entrypoint": f'{shlex.join(command)} --address "$RAY_ADDRESS"',
        "submissionMode": "K8sJobMode",
        "backoffLimit": _RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster(groups, site, (mount, {"name": "recipe", "mountPath": _RECIPE, "readOnly": True})),
    }
    if max_hours:
        spec["entrypoint"] += f" --max-hours {max_hours:g}"
        spec["activeDeadlineSeconds"] = int(max_hours * 3600) + 2 * _GRACE_SECONDS
    data = {_key(path): text for path, text in files.items()}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(f"{name}-recipe", site), "data": data},
        _resource("RayJob", name, site, spec),
    ]


def ray_service(name: str, groups: Sequence[Group], site: Site, *, application: str) -> Manifest:
    """A RayService with `application`, Ray Serve's own configuration as YAML; an update starts a cluster beside it."""
    spec = {"serveConfigV2": application, "rayClusterConfig": _cluster(groups, site)}
    return _resource("RayService", name, site, spec)


def _resource(kind: str, name: str, site: Site, spec: dict[str, Any]) -> Manifest:
    return {"apiVersion": _API, "kind": kind, "metadata": _metadata(name, site), "spec": spec}


def _metadata(name: str, site: Site) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "raylign"}
    return {"name": name, **({"namespace": site.namespace} if site.namespace else {}), "labels": labels}


def _cluster(groups: Sequence[Group], site: Site, mount: tuple[Manifest, Manifest] | None = None) -> dict[str, Any]:
    head = {"rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": _pod(_HEAD, site, mount)}
    return {
        "rayVersion": site.ray_version,
        "authOptions": {"mode": "token", "secretName": site.token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": _IDLE_SECONDS},
        "headGroupSpec": head,
        "workerGroupSpecs": [_workers(group, site, mount) for group in groups],
    }


def _workers(group: Group, site: Site, mount: tuple[Manifest, Manifest] | None) -> dict[str, Any]:
    each = {"cpu": str(group.cpus), "memory": f"{group.memory_gb}Gi"}
    if group.gpus:
        each["nvidia.com/gpu"] = str(group.gpus)
    return {
        "groupName": group.name,
        "replicas": group.least,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "rayStartParams": {},
        "template": _pod(each, site, mount),
    }


def _pod(each: Mapping[str, str], site: Site, mount: tuple[Manifest, Manifest] | None) -> dict[str, Any]:
    volume, mounted = mount or ({}, {})
    claim = {"name": "storage", "persistentVolumeClaim": {"claimName": site.storage_claim}}
    container = {
        "name": "ray",
        "image": site.image,
        "env": [_variable(name, *where) for name, where in site.secrets.items()],
        "resources": {"requests": dict(each), "limits": dict(each)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "storage", "mountPath": STORAGE},
            {"name": "shm", "mountPath": "/dev/shm"},
            *([mounted] if mounted else []),
        ],
    }
    return {
        "spec": {
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            # Ray's object store lies in shared memory, of which a container has 64 MB otherwise
            "volumes": [claim, {"name": "shm", "emptyDir": {"medium": "Memory"}}, *([volume] if volume else [])],
        }
    }


def _variable(name: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _items(files: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": _key(path), "path": path} for path in files]


def _key(path: str) -> str:
    """A ConfigMap's keys have no slash."""
    return path.replace("/", "__")
