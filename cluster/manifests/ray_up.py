"""The configuration that `ray up` takes: machines of a cloud that come and go, or a list of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from .groups import Group

_IDLE_MINUTES = 5
_TOKEN = "~/.ray/auth_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Where the machines come from: `aws` or `gcp` with a region and a type of machine by group, or `hosts`."""

    provider: Literal["aws", "gcp", "hosts"]
    region: str = ""
    project: str = ""
    """GCP's project."""
    types: tuple[tuple[str, str], ...] = ()
    """Of each group the cloud's name of its machines; `head` too."""
    hosts: tuple[str, ...] = ()
    """Addresses of one's own machines, the head's first."""
    ssh_user: str = "ubuntu"
    install: str = "pip install raylign"
    """How a machine gets the toolkit."""
    spot: tuple[str, ...] = ()
    """Groups that may be taken away at any time, for less."""


def ray_up(name: str, groups: Sequence[Group], machines: Machines) -> dict[str, Any]:
    """A configuration for `ray up`. Raises `InputError` for a group whose machines are not named."""
    base = {
        "cluster_name": name,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "auth": {"ssh_user": machines.ssh_user},
        # every node must have the same token: Ray asks for it wherever it listens
        "file_mounts": {_TOKEN: _TOKEN},
        "setup_commands": [machines.install, f"chmod 600 {_TOKEN}"],
        "head_start_ray_commands": [
            "ray stop",
            _start("--head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml"),
        ],
        "worker_start_ray_commands": ["ray stop", _start("--address=$RAY_HEAD_IP:6379")],
    }
    return base | (_own(machines) if machines.provider == "hosts" else _cloud(groups, machines))


def _start(options: str) -> str:
    return f"RAY_AUTH_MODE=token ray start {options} --dashboard-host=127.0.0.1 --disable-usage-stats"


def _own(machines: Machines) -> dict[str, Any]:
    if not machines.hosts:
        raise InputError("no machines: give --hosts with their addresses, the head's first")
    head, *workers = machines.hosts
    return {
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "max_workers": len(workers),
        "min_workers": len(workers),
    }


def _cloud(groups: Sequence[Group], machines: Machines) -> dict[str, Any]:
    types = dict(machines.types)
    for group in ("head", *(g.name for g in groups)):
        if group not in types:
            raise InputError(
                f"no machines for {group}: give --machine {group}=TYPE, a type of {machines.provider}'s "
                f"({_needs(group, groups)})"
            )
    if not machines.region or (machines.provider == "gcp" and not machines.project):
        raise InputError(f"{machines.provider} needs --region{' and --project' if machines.provider == 'gcp' else ''}")
    nodes = {"head": {"resources": {"CPU": 0}, "node_config": _node(machines, types["head"], spot=False)}}
    nodes |= {
        group.name: {
            "min_workers": group.least,
            "max_workers": group.most,
            "resources": {"CPU": group.cpus, **({"GPU": group.gpus} if group.gpus else {})},
            "node_config": _node(machines, types[group.name], spot=group.name in machines.spot),
        }
        for group in groups
    }
    provider = {"type": machines.provider, "region": machines.region}
    if machines.provider == "gcp":
        provider |= {"availability_zone": f"{machines.region}-a", "project_id": machines.project}
    return {
        "provider": provider,
        "max_workers": sum(group.most for group in groups),
        "head_node_type": "head",
        "available_node_types": nodes,
    }


def _node(machines: Machines, kind: str, *, spot: bool) -> dict[str, Any]:
    if machines.provider == "aws":
        return {"InstanceType": kind, **({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {})}
    return {"machineType": kind, **({"scheduling": [{"provisioningModel": "SPOT"}]} if spot else {})}


def _needs(name: str, groups: Sequence[Group]) -> str:
    for group in groups:
        if group.name == name:
            gpus = f", {group.gpus} GPUs" if group.gpus else ""
            return f"at least {group.cpus} CPUs{gpus} and {group.memory_gb} GB"
    return "4 CPUs and 16 GB will do"
