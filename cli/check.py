"""`raylign check`: prove a recipe's data, masks, template, rewards, memory and placement, and stop there."""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import answer, notes, print_json, print_table
from .run import JsonOption, SetOption

if TYPE_CHECKING:
    from ..trainers.data.proof import Proof


class Part(StrEnum):
    """What of a recipe is looked at alone."""

    DATA = "data"
    PLAN = "plan"
    PLACEMENT = "placement"


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    set_: SetOption = None,
    address: Annotated[
        str | None, typer.Option(help="Check placement on this cluster instead of this machine.")
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(help="With --only: nodes that you might get, 8x128,1024gb,8xH100."),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many masks to print for each stage.")] = 2,
    only: Annotated[
        Part | None, typer.Option(help="Look at this alone; plan and placement read neither data nor weights.")
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="A benchmark's file, none of which may stand in training rows.")
    ] = None,
    flag: Annotated[list[str] | None, typer.Option(help="file.py:function that flags a text by a reason.")] = None,
    near: Annotated[bool, typer.Option(help="Look for near-duplicates, too.")] = False,
    json: JsonOption = False,
) -> None:
    """Prove a recipe before it costs anything: files, columns, template, supervised tokens, rewards, resources.

    The first examples are printed token by token; what the loss counts is coloured. Starts no actor.

    Example: raylign check recipes/quickstart.yaml
    """
    from ..cluster.errors import InputError
    from ..cluster.rundir import refuse_reserved
    from ..trainers.recipe import load_recipe

    overrides = [*(set_ or []), *([f"cluster.address={address}"] if address else [])]
    config = load_recipe(recipe, overrides, planning=only is Part.PLAN)
    refuse_reserved(config.name)
    if only is Part.DATA:
        from .doctor import show_data

        return show_data(config, against or [], flag or [], near=near, json=json)
    if only:
        from .plan import show_placement, show_plan

        show = show_plan if only is Part.PLAN else show_placement
        return show(config, node or [], json=json)
    if node:
        raise InputError("--node describes nodes for --only plan or --only placement: add one of the two")
    with tempfile.TemporaryDirectory(prefix="raylign-check-") as folder:
        facts, masks, proofs = _prove(config, Path(folder), examples)
    if json:
        print_json(facts)
    else:
        _print_proof(facts, masks)
    for proof in proofs:
        proof.require()


def _prove(config: Any, folder: Path, examples: int) -> tuple[dict[str, Any], dict[str, list[Any]], "list[Proof]"]:
    from ..trainers.data.inputs import read_inputs
    from ..trainers.data.prepare import prepare
    from ..trainers.data.proof import render_mask
    from ..trainers.launch import placement, rooms
    from ..trainers.plan.refusal import require_memory

    fits = placement(config)
    prepare(config, folder)
    inputs = read_inputs(config, folder, lambda text: notes.print(text, style="dim", highlight=False))
    if not any(given.proof.refusals for given in inputs.stages):  # they are told first, and have no length
        require_memory(config, inputs, rooms(config))
    facts = {
        "data": [g.proof.facts() | {"sources": [s.facts() for s in g.sources]} for g in inputs.stages],
        "held_out": len(inputs.evaluation),
    }
    masks = {
        g.proof.stage: [render_mask(row, inputs.tokenizer) for row in g.proof.encoded[:examples]] for g in inputs.stages
    }
    return facts | {"placement": fits}, masks, [g.proof for g in inputs.stages]


def _print_proof(facts: dict[str, Any], masks: dict[str, list[Any]]) -> None:
    for stage, rows in masks.items():
        answer.print(f"\n{stage}: the first examples; what the loss counts is coloured", style="bold")
        for row in rows:
            answer.print(row)
    columns = ["stage", "rows", "tokens", "supervised_tokens", "longest", "refused"]
    print_table("\ndata", columns, [[stage[c] for c in columns] for stage in facts["data"]])
    for stage in facts["data"]:
        for refusal in stage["refusals"][:5] if stage["refused"] > 1 else ():  # the first is the error's own
            notes.print(f"{stage['stage']} row {refusal['row']}: {refusal['reason']}", style="red", highlight=False)
    if facts["held_out"]:
        answer.print(f"{facts['held_out']} held-out questions, none of them in the training data", highlight=False)
    where = [f"{p['stage']}: {p['role']} {p['count']} × {p['each']}" for p in facts["placement"]["asked"]]
    answer.print(f"fits on {facts['placement']['nodes']}: {'; '.join(where)}", highlight=False)
