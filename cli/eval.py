"""`raylign eval`: what a model is worth on held-out text, and what it forgot."""

from pathlib import Path
from typing import Annotated

import typer

from .output import answer, notes, print_json
from .run import JsonOption, StorageOption


def eval(
    model: Annotated[Path, typer.Argument(help="A run's name, or a model folder.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter folder on that model folder.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text, a passage a line.")] = None,
    alarm: Annotated[float, typer.Option(min=0, help="Rise of the loss on general text that is an alarm.")] = 0.1,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Measure held-out loss, KL to the base and forgetting, and name what is wrong.

    Example: raylign eval quickstart --text held_out.txt
    """
    from ..cluster.errors import InputError
    from ..trainers.finished_model import model_of
    from ..trainers.forgetting import evaluate_folder

    if text and not text.is_file():
        raise InputError(f"no text file at {text}")
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()] if text else []
    state = model_of(model, adapter, (storage or Path("runs")).resolve())
    found = evaluate_folder(state.base, state.adapter, lines, alarm=alarm)
    if json:
        print_json(found)
        return
    for name in ("held_out", "general"):
        if part := found.get(name):
            said = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in part.items())
            answer.print(f"{name.replace('_', '-')}: {said}", highlight=False)
    if found["forgetting"] is not None:
        answer.print(f"forgetting: {found['forgetting']:+.4f} nats a token", highlight=False)
    for flag in found["flags"]:
        notes.print(flag.replace("_", " "), style="red", highlight=False)
