"""`raylign up`: a Ray cluster on this machine."""

from dataclasses import asdict
from typing import Annotated

import typer

from .output import answer, notes, print_json
from .run import JsonOption

NameOption = Annotated[str, typer.Option(help="The cluster's name, where several are up.")]


def up(
    local: Annotated[bool, typer.Option("--local", help="Start the nodes on this machine.")] = False,
    nodes: Annotated[int, typer.Option(min=1, max=32, help="How many nodes.")] = 1,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs a node offers; the machine's.")] = None,
    port: Annotated[int, typer.Option(min=1024, max=65535, help="The port of the dashboard and jobs API.")] = 8265,
    name: NameOption = "local",
    json: JsonOption = False,
) -> None:
    """Start a Ray cluster of several nodes here; it answers on this machine only and asks for a token.

    Example: raylign up --local --nodes 3
    """
    from ..cluster.errors import InputError
    from ..cluster.local import up as start

    if not local:
        raise InputError("add --local: only clusters on this machine can be started yet")
    with notes.status("starting") as shown:
        cluster = start(
            nodes, cpus_per_node=cpus_per_node, port=port, name=name, say=lambda text: shown.update(f"starting {text}")
        )
    if json:
        facts = asdict(cluster)
        print_json({key: facts[key] for key in ("name", "nodes", "cpus_per_node", "address", "jobs_url", "token_file")})
        return
    answer.print(
        f"{cluster.nodes} nodes with {cluster.cpus_per_node} CPUs each are up at {cluster.address}\n"
        f"submit to it:  raylign submit RECIPE --address {cluster.jobs_url}\n"
        f"look at it:    RAY_AUTH_MODE=token RAY_ADDRESS={cluster.jobs_url} ray list actors\n"
        f"its token:     {cluster.token_file}\n"
        f"end it:        raylign down{'' if name == 'local' else f' --name {name}'}",
        highlight=False,
    )
