"""Nodes that are going away: Ray's notice of `ray drain-node`, an autoscaler, or a cloud that takes a node back."""

CONTROLLER = "the controller"


def going_away() -> dict[str, str]:
    """What of this process's Ray job is on draining nodes: its actors and the process itself, with the node's address.

    Actors without a name go by their class. Empty where Ray is not connected.
    """
    import ray
    from ray._private.state import actors, state

    if not ray.is_initialized() or not (draining := state.get_draining_nodes()):
        return {}
    here = ray.get_runtime_context()
    addresses = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
    found = {
        actor["Name"] or actor["ActorClassName"]: actor["Address"]["NodeID"]
        for actor in actors(actor_state_name="ALIVE").values()
        if actor["JobID"] == here.get_job_id()
    }
    found[CONTROLLER] = here.get_node_id()
    return {name: addresses.get(node, node) for name, node in found.items() if node in draining}
