"""`raylign up`: a Ray cluster on this machine, or the files by which others start one."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .output import answer, notes, print_json
from .run import JsonOption, SetOption

NameOption = Annotated[str, typer.Option(help="The cluster's name, where several are up.")]


class Provider(StrEnum):
    """Whose machines `ray up` takes."""

    AWS = "aws"
    GCP = "gcp"
    HOSTS = "hosts"


class Kind(StrEnum):
    """Which of KubeRay's resources."""

    CLUSTER = "cluster"
    JOB = "job"
    SERVICE = "service"


def up(
    local: Annotated[bool, typer.Option("--local", help="Start the nodes on this machine.")] = False,
    nodes: Annotated[int, typer.Option(min=1, max=32, help="How many nodes here.")] = 1,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs a node here offers; the machine's.")] = None,
    port: Annotated[int, typer.Option(min=1024, max=65535, help="The port of the dashboard and jobs API.")] = 8265,
    name: NameOption = "local",
    tls: Annotated[bool, typer.Option("--tls", help="Nodes here and their drivers speak TLS.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Ray's metrics ports here, open without a token.")] = False,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="A resource of KubeRay's, sized by --recipe.")] = False,
    kind: Annotated[Kind, typer.Option(help="KubeRay: which resource.")] = Kind.JOB,
    ray: Annotated[Provider | None, typer.Option(help="A configuration for `ray up`, sized by --recipe.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe whose roles are to fit.")] = None,
    set_: SetOption = None,
    image: Annotated[str, typer.Option(help="KubeRay: an image with raylign.")] = "raylign:latest",
    claim: Annotated[str, typer.Option(help="KubeRay: the volume claim of the storage.")] = "raylign-storage",
    namespace: Annotated[str | None, typer.Option(help="KubeRay: the namespace.")] = None,
    secret: Annotated[list[str] | None, typer.Option(help="KubeRay: VARIABLE=SECRET:KEY, such as a W&B key.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="The most GPUs of one node.")] = 8,
    region: Annotated[str, typer.Option(help="ray up: the cloud's region.")] = "",
    project: Annotated[str, typer.Option(help="ray up: GCP's project.")] = "",
    machine: Annotated[list[str] | None, typer.Option(help="ray up: GROUP=TYPE, head=m5.xlarge.")] = None,
    spot: Annotated[list[str] | None, typer.Option(help="ray up: a group that may be taken away.")] = None,
    hosts: Annotated[str, typer.Option(help="ray up: your own machines, the head first: 10.0.0.1,10.0.0.2.")] = "",
    max_hours: Annotated[float | None, typer.Option(min=0.0, help="KubeRay: a job's time.")] = None,
    print_: Annotated[bool, typer.Option("--print", help="Print the file and start nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Start a Ray cluster: several nodes here, which answer on this machine only and ask for a token; or, sized by a
    recipe, by KubeRay (given to kubectl, or printed) or `ray up` (printed).

    Example: raylign up --local --nodes 3

    Example: raylign up --kuberay --recipe recipes/dpo.yaml --print
    """
    from ..cluster.errors import InputError

    if sum((local, kuberay, ray is not None)) != 1:
        raise InputError("where: add --local, --kuberay or --ray aws|gcp|hosts")
    if local:
        return _local(nodes, cpus_per_node, port, name, encrypted=tls, metrics=metrics, json=json)
    if tls:
        raise InputError("--tls makes certificates for nodes of this machine; docs/operations.md shows it for others")
    if recipe is None:
        raise InputError("what for: give --recipe, whose roles size the cluster")
    from ..trainers.manifests import Options, manifests

    options = Options(
        name=None if name == "local" else name,
        image=image,
        claim=claim,
        namespace=namespace,
        secrets=tuple(secret or ()),
        gpus_per_node=gpus_per_node,
        region=region,
        project=project,
        machines=tuple(machine or ()),
        spot=tuple(spot or ()),
        hosts=tuple(host.strip() for host in hosts.split(",") if host.strip()),
        max_hours=max_hours,
    )
    made = manifests(recipe, list(set_ or []), ray.value if ray else kind.value, options)
    if json:
        return print_json(made)
    from ..cluster.manifests.files import apply, as_yaml

    if kuberay and not print_:
        return answer.print(apply(made), highlight=False)
    answer.print(as_yaml(made), end="", highlight=False)


def _local(
    nodes: int, cpus_per_node: int | None, port: int, name: str, *, encrypted: bool, metrics: bool, json: bool
) -> None:
    from ..cluster.local import up as start
    from ..cluster.tls import variables

    with notes.status("starting") as shown:
        cluster = start(
            nodes,
            cpus_per_node=cpus_per_node,
            port=port,
            name=name,
            encrypted=encrypted,
            metrics=metrics,
            say=lambda text: shown.update(f"starting {text}"),
        )
    needed = variables(Path(cluster.tls)) if cluster.tls else {}
    if json:
        facts = asdict(cluster)
        told = ("name", "nodes", "cpus_per_node", "address", "jobs_url", "token_file")
        print_json({key: facts[key] for key in told} | {"environment": needed})
        return
    exports = " ".join(f"{name}={value}" for name, value in needed.items())
    tls_line = f"drivers need:  export {exports}\n" if needed else ""
    answer.print(
        f"{cluster.nodes} nodes with {cluster.cpus_per_node} CPUs each are up at {cluster.address}\n"
        f"submit to it:  raylign submit RECIPE --address {cluster.jobs_url}\n"
        f"look at it:    RAY_AUTH_MODE=token RAY_ADDRESS={cluster.jobs_url} ray list actors\n"
        f"its token:     {cluster.token_file}\n"
        f"{tls_line}"
        f"end it:        raylign down{'' if name == 'local' else f' --name {name}'}",
        highlight=False,
    )
