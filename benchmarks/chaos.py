"""The kill matrix, whole: `python -m benchmarks.chaos`, from the root of the repository.

One run of a tiny model goes on undisturbed. Others of the same recipe suffer every cell of the matrix, a run a fault, a
cell every other step, and must end with the same metrics, samples and weights. Where a fault ends the run (it must say
so), it is resumed. Nodes die in runs of their own, in a Ray of two. Needs root, for a disk of a fixed size.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import results
from .cells import FAULTS, ROLES, Cell, all_cells, impossible, overview
from .nodes import two_nodes
from .table import write_table
from .trouble import differences, every_other_step, suffer, write_recipe

_DISK = "64m"
_RESULT = results.RESULTS / "chaos.json"


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of a fixed size at a folder. Raises `CalledProcessError` where it cannot be mounted."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 all cells ended with the undisturbed run's result, 1 not."""
    from raylign.cluster.processes import adopt_orphans

    from .models import tiny_model

    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES, help="all by default")
    options = parser.parse_args(arguments)
    adopt_orphans()
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    runs = _runs(options.faults or FAULTS, options.roles)
    steps = 2 * max(map(len, runs.values())) + 2
    model = tiny_model(place / "model")
    recipe = write_recipe(place, model, steps)
    suffer(recipe, place / "calm", {})
    with contextlib.ExitStack() as stack:
        if any(on_nodes for _, on_nodes in runs):
            address = stack.enter_context(two_nodes())
            spread = write_recipe(place / "nodes", model, steps, f"cluster.address={address}")
        else:
            spread = recipe
        equal = [_suffer_one(spread if on_nodes else recipe, place, cells) for (_, on_nodes), cells in runs.items()]
    write_table(results.RESULTS)
    print(overview(results.read(_RESULT)["cases"]))
    return 0 if all(equal) else 1


def _runs(faults: Sequence[str], roles: Sequence[str]) -> dict[tuple[str, bool], list[Cell]]:
    """The cells that can happen, by run: a fault, and whether a node has it."""
    runs: dict[tuple[str, bool], list[Cell]] = {}
    for cell in all_cells():
        if cell.fault in faults and cell.role in roles and not impossible(cell):
            runs.setdefault((cell.fault, cell.role == "node"), []).append(cell)
    return runs


def _suffer_one(recipe: Path, place: Path, cells: Sequence[Cell]) -> bool:
    """Have a run suffer these cells of one fault, and keep what came of them; whether nothing differs."""
    fault = cells[0].fault
    print(f"{fault}: {len(cells)} cells in {recipe.parent}", file=sys.stderr)
    storage = recipe.parent / fault.replace(" ", "-")
    with small_disk(storage):
        told = suffer(recipe, storage, every_other_step(cells))
        differ = differences(place / "calm/chaos", storage / "chaos")
        weights = [json.loads((s / "chaos/summary.json").read_text())["weights"] for s in (place / "calm", storage)]
    for cell in told:
        cell["equal"] = not (differ.get(cell["step"]) or differ.get(cell["step"] + 1))
    facts = {"machine": results.machine(), "versions": results.versions(), "date": results.now()}
    kept = [case for case in results.read(_RESULT)["cases"] if _cell(case) not in cells]
    results.write(_RESULT, {"name": "chaos", **facts, "cases": sorted(kept + told, key=lambda c: _ORDER[_cell(c)])})
    print(json.dumps({"fault": fault, "weights": weights, "differences": differ}), file=sys.stderr)
    return weights[0] == weights[1] and not differ


def _cell(case: dict[str, Any]) -> Cell:
    return Cell(case["fault"], case["role"], case["phase"])


_ORDER = {cell: place for place, cell in enumerate(all_cells())}


if __name__ == "__main__":
    sys.exit(main())
