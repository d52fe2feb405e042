"""The kill matrix, whole: `python -m benchmarks.chaos`, from the root of the repository.

One run of a tiny model goes on undisturbed. Others of the same recipe suffer every cell of the matrix, ten a run, one
every other step, and must end with the same metrics, samples and weights. Where a fault ends the run (it must say so),
it is resumed. Nodes die in runs of their own, in a Ray of two. Needs root, for a disk of a fixed size.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import results
from .cells import FAULTS, ROLES, Cell, all_cells, impossible, overview
from .nodes import ROOM, two_nodes
from .table import write_table
from .trouble import differences, every_other_step, suffer, write_recipe

_DISK = "64m"
_CELLS = 10
"""How many cells a run suffers."""
_STEPS = 2 * _CELLS + 2
_RESULT = results.RESULTS / "chaos.json"


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of a fixed size at a folder. Raises `CalledProcessError` where it cannot be mounted."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


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
    chosen = [c for c in all_cells() if c.fault in (options.faults or FAULTS) and c.role in options.roles]
    model = tiny_model(place / "model")
    recipe = write_recipe(place, model, _STEPS)
    suffer(recipe, place / "calm", {})
    equal = [_suffer_some(recipe, place, cells) for cells in _runs(c for c in chosen if c.role != "node")]
    if runs := _runs(c for c in chosen if c.role == "node"):
        with two_nodes() as address:
            spread = write_recipe(place / "nodes", model, _STEPS, f"cluster.address={address}", *ROOM)
            equal += [_suffer_some(spread, place, cells) for cells in runs]
    write_table(results.RESULTS)
    print(overview(results.read(_RESULT)["cases"]))
    return 0 if all(equal) else 1


def _runs(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells that can happen, as many together as one run takes."""
    possible = [cell for cell in cells if not impossible(cell)]
    return [possible[i : i + _CELLS] for i in range(0, len(possible), _CELLS)]


def _suffer_some(recipe: Path, place: Path, cells: Sequence[Cell]) -> bool:
    """Have a run suffer these cells, and keep what came of them; whether it ended as it should."""
    print(f"{cells[0].name} … {cells[-1].name}: in {recipe.parent}", file=sys.stderr)
    storage = recipe.parent / f"{cells[0].name} and {len(cells) - 1} more".replace(" ", "-")
    try:
        with small_disk(storage):
            told = suffer(recipe, storage, every_other_step(cells))
            differ = differences(place / "calm/chaos", storage / "chaos")
            weights = [json.loads((s / "chaos/summary.json").read_text())["weights"] for s in (place / "calm", storage)]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return False
    for cell in told:
        cell["equal"] = not (differ.get(cell["step"]) or differ.get(cell["step"] + 1))
    facts = {"machine": results.machine(), "versions": results.versions(), "date": results.now()}
    kept = [case for case in results.read(_RESULT)["cases"] if _cell(case) not in cells]
    results.write(_RESULT, {"name": "chaos", **facts, "cases": sorted(kept + told, key=lambda c: _ORDER[_cell(c)])})
    print(json.dumps({"weights": weights, "differences": differ}), file=sys.stderr)
    return weights[0] == weights[1] and not differ


def _cell(case: dict[str, Any]) -> Cell:
    return Cell(case["fault"], case["role"], case["phase"])


_ORDER = {cell: place for place, cell in enumerate(all_cells())}


if __name__ == "__main__":
    sys.exit(main())
