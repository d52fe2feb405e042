"""`raylign export`: a trained model for another program, after proof that it is still the same."""

from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_table
from .run import JsonOption, StorageOption


def export(
    model: Annotated[Path, typer.Argument(help="A run's name, or a model folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter folder on that model folder, merged first.")] = None,
    to: Annotated[str, typer.Option(help="safetensors, bnb-4bit, bnb-8bit or gguf.")] = "safetensors",
    llama_cpp: Annotated[Path | None, typer.Option(help="A checkout of llama.cpp, whose converter makes GGUF.")] = None,
    kl: Annotated[float, typer.Option(min=0, help="Nats a token that an export may be away.")] = 0.1,
    agreement: Annotated[float, typer.Option(min=0, max=1, help="Share of greedy tokens that must be the same.")] = 0.9,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Export a model; what differs too much from what was trained is refused, and the numbers printed.

    Example: raylign export quickstart --to bnb-4bit --out small
    """
    from ..trainers.export import Limits
    from ..trainers.export import export as write
    from ..trainers.finished_model import model_of

    state = model_of(model, adapter, (storage or Path("runs")).resolve())
    found = write(state.base, state.adapter, out, to=to, limits=Limits(kl=kl, agreement=agreement), llama_cpp=llama_cpp)
    if json:
        print_json({"out": str(out), "to": to, "gate": found})
        return
    rows = [[c["form"], "" if c["kl"] is None else f"{c['kl']:.3g}", f"{c['agreement']:.3g}"] for c in found]
    print_table(str(out), ["form", "KL", "agreement"], rows)
