"""`raylign merge`: an adapter into its base, several adapters into one, or two whole models into one."""

from pathlib import Path
from typing import Annotated

import typer

from .output import answer, print_json
from .run import JsonOption, StorageOption


def merge(
    base: Annotated[
        Path, typer.Argument(help="A run's name, or the model folder that adapters are on; of slerp, the first model.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    others: Annotated[
        list[Path] | None, typer.Argument(help="Of a folder: an adapter folder, several, or of slerp the second model.")
    ] = None,
    how: Annotated[
        str, typer.Option(help="base: into the base; slerp; or of adapters linear, svd, ties, dare_linear, …")
    ] = "base",
    weight: Annotated[list[float] | None, typer.Option(help="Of each adapter, in their order; equal shares.")] = None,
    density: Annotated[float, typer.Option(help="Share of values that ties, dare and magnitude_prune keep.")] = 0.5,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result of an svd; the largest by default.")] = None,
    t: Annotated[float, typer.Option(help="Place of slerp between the first model (0) and the second (1).")] = 0.5,
    quantized: Annotated[bool, typer.Option(help="The adapter was trained on the base in NF4: add to that.")] = False,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Merge in float32 and write an ordinary folder, whole or not at all.

    Example: raylign merge quickstart --out merged
    """
    from ..cluster.errors import InputError
    from ..trainers.finished_model import model_of
    from ..trainers.merging import combine_adapters, merge_into_base, slerp_models

    if not others:
        state = model_of(base, None, (storage or Path("runs")).resolve())
        base, others = state.base, [state.adapter] if state.adapter else []
    if not others:
        raise InputError(f"{base} is whole: name what is to be merged with it")
    if how in ("base", "slerp") and len(others) > 1:
        raise InputError(
            f"--how {how} takes one folder beside the first, and there are {len(others)}: combine adapters first"
        )
    if how == "base":
        merge_into_base(base, others[0], out, quantized=quantized)
    elif how == "slerp":
        slerp_models(base, others[0], out, t=t)
    else:
        combine_adapters(base, others, out, how=how, weights=weight, density=density, rank=rank)
    print_json({"out": str(out), "how": how}) if json else answer.print(str(out), highlight=False)
