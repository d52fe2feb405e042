"""What `raylign check --only plan` and `--only placement` print."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import answer, notes, print_json, print_table

if TYPE_CHECKING:
    from ..trainers.config import RunConfig

_ITEMS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "headroom")


def show_plan(config: "RunConfig", nodes: Sequence[str], *, json: bool) -> None:
    """Print what every role of every stage needs, on `nodes` in words, where there are any, or those that are there.

    Raises `DoesNotFit` after that where the memory or the places are not there.
    """
    from ..trainers.launch import rooms
    from ..trainers.pipeline import check_placement
    from ..trainers.plan.room import described, flops_per_second, require_room
    from ..trainers.plan.stages import plan_stages

    stages = plan_stages(config, config_folder(config))
    said = [described(text) for text in nodes]
    there = [room for _, rooms in said for room in rooms] or rooms(config)
    facts = [stage.facts(flops_per_second(stage, there)) for stage in stages]
    if json:
        print_json({"plan": {"stages": facts}})
    else:
        _print_plan(facts)
    require_room(stages, there)
    if nodes:
        check_placement(config, [offer for offers, _ in said for offer in offers])


def show_placement(config: "RunConfig", nodes: Sequence[str], *, json: bool) -> None:
    """Print what is asked and where it fits, on `nodes` in words or those that are there. Raises `DoesNotFit`."""
    from ..trainers.launch import placement
    from ..trainers.plan.room import described

    fits = placement(config, [offer for text in nodes for offer in described(text)[0]])
    if json:
        print_json({"placement": fits})
        return
    where = [f"{p['stage']}: {p['role']} {p['count']} × {p['each']}" for p in fits["asked"]]
    answer.print(f"fits on {fits['nodes']}: {'; '.join(where)}", highlight=False)


def config_folder(config: "RunConfig") -> Path:
    """Where the model's config.json lies; of a hub id that file alone is fetched."""
    from ..cluster.errors import InputError
    from ..trainers.recipe import PREPARED

    path = config.model.path
    if path.startswith(PREPARED):
        raise InputError(f"model.path {path}: the recipe's script makes that model: run `raylign check` without --only")
    return Path(path) if Path(path).is_absolute() else _fetched(path)


def _fetched(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from ..cluster.errors import InputError

    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {hub_id!r} is no folder here and its config.json cannot be fetched: {reason}"
        ) from None


def _print_plan(stages: list[dict[str, Any]]) -> None:
    for stage in stages:
        steps = f"{stage['steps']:,} steps, {stage['tokens']:,} tokens at most" if stage["steps"] else "one pass"
        took = f", about {stage['seconds']:,} s of computing" if stage["seconds"] else ""
        answer.print(
            f"\n{stage['stage']} ({stage['type']}): model state {stage['total_gb']:,.1f} GB, "
            f"{steps}{took}, {stage['disk_gb']:,.1f} GB of disk",
            highlight=False,
        )
        roles = stage["roles"]
        rows = [[item.replace("_", " "), *(_gigabytes(r["items"][item]) for r in roles)] for item in _ITEMS]
        rows.append(["all", *(_gigabytes(r["per_device_gb"]) for r in roles)])
        columns = [f"{r['devices']} × {r['role']} ({r['device']})" for r in roles]
        print_table("GB on each device", ["", *columns], rows)
        for said in stage["assumes"]:
            notes.print(said, style="yellow", highlight=False)


def _gigabytes(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
