"""`raylign trace`: what each actor of a run did and when, for a trace viewer."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .output import notes
from .run import StorageOption


def trace(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    step: Annotated[int | None, typer.Option(min=0, help="One step alone; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output by default.")] = None,
    storage: StorageOption = None,
) -> None:
    """Write a run's lanes as a Chrome trace, also while the run goes on; open it at https://ui.perfetto.dev.

    Example: raylign trace quickstart --step 20 --out step.json
    """
    from ..cluster.errors import InputError
    from ..cluster.rundir import RunDir, write_atomically
    from ..trainers.report.trace import chrome_trace

    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    spans = directory.events("span")
    if step is not None and not any(span.get("step") == step for span in spans):
        known = [span["step"] for span in spans if "step" in span]
        there = f"there are {min(known)} to {max(known)}" if known else "there is none"
        raise InputError(f"run {run} has no step {step} yet: {there}")
    text = json.dumps(chrome_trace(run, spans, step))
    if out is None:
        print(text)
        return
    write_atomically(out, text)
    notes.print(f"{out}: open it at https://ui.perfetto.dev", highlight=False)
