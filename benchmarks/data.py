"""Rows per second of reading, templating and checking, against `datasets.map` with the same chat template.

Both sides read the same JSONL of conversations. Templating: both give tokens, ours also proves each row's mask.
Checking: theirs maps rows to the digest that finds exact copies; ours does all of the doctor's exact checks.
"""

import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from raylign.trainers.data.doctor import diagnose  # pyright: ignore[reportMissingImports]
from raylign.trainers.data.proof import prove_stage  # pyright: ignore[reportMissingImports]
from raylign.trainers.data.rows import load_rows  # pyright: ignore[reportMissingImports]
from raylign.trainers.data.template import load_tokenizer  # pyright: ignore[reportMissingImports]
from raylign.trainers.stages import DataConfig, SftStage  # pyright: ignore[reportMissingImports]

from .arena import Arena
from .measured import Case, Contest, Measured, measure
from .models import tiny_model


def cases() -> list[Case]:
    """Named like `400-rows-templating`."""
    return [_case(400, work) for work in ("templating", "checking")]


def quick_cases() -> list[Case]:
    """A few rows."""
    return [_case(40, "templating"), _case(40, "checking")]


def _case(count: int, work: str) -> Case:
    return Case(
        name=f"{count}-rows-{work}", peer="datasets.map", unit="rows/s", group="data", make=partial(_make, count, work)
    )


def _make(count: int, work: str, _: Arena) -> Contest:
    folder = Path(tempfile.mkdtemp(prefix="raylign-bench-data-"))
    path, tokenizer = _rows(folder, count), load_tokenizer(tiny_model(folder / "model"))
    data = DataConfig(path=str(path))

    def ours(_: int) -> Measured:
        if work == "checking":
            return measure(count, lambda: diagnose(load_rows(data, path, "messages")))
        stage = SftStage(data=data, max_length=4096)
        return measure(count, lambda: prove_stage(stage, load_rows(data, path, "messages"), tokenizer).require())

    row_work = _digest if work == "checking" else partial(_templated, tokenizer)

    def theirs(pair: int) -> Measured:
        return measure(count, lambda: _mapped(path, row_work, folder / f"cache-{pair}"))

    return Contest(
        ours=ours,
        theirs=theirs,
        warm_up=lambda: (ours(0), theirs(0)),
        settings={"rows": count, "words": "30 to 120 a message, two turns", "seed": 0},
    )


def _mapped(path: Path, work: Callable[[dict[str, Any]], dict[str, Any]], cache: Path) -> None:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    rows = load_dataset("json", data_files=str(path), cache_dir=str(cache), split="train")
    rows.map(work, load_from_cache_file=False)


def _templated(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    return dict(tokenizer.apply_chat_template(row["messages"], return_dict=True))


def _digest(row: dict[str, Any]) -> dict[str, Any]:
    text = " ".join(" ".join(message["content"] for message in row["messages"]).split()).casefold()
    return {"digest": blake2b(text.encode(), digest_size=16).digest()}


def _rows(folder: Path, count: int) -> Path:
    chance, path = random.Random(0), folder / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(count):
            said = [" ".join(f"w{chance.randrange(5000)}" for _ in range(chance.randint(30, 120))) for _ in range(4)]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
