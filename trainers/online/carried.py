"""Groups that a step left to the next, with what was drawn of them, as a file of a checkpoint.

Prompts are not in it: a group has the number of its row, and the data is that of the run.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...cluster.errors import RunFailed
from ...rollout.records import Group, Origin, Sample, Span
from .ahead import Prompt

_FILE = "carried.safetensors"


def keep_carried(folder: Path, groups: Sequence[Group]) -> None:
    """Write `carried.safetensors`, where there are any. Raises `RunFailed` where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if not groups:
        return
    samples = [sample for group in groups for sample in group.samples]
    tensors = {name: np.concatenate([getattr(s, name) for s in samples]) for name in ("tokens", "logprobs")}
    told = [{"origin": group.origin, "samples": [_facts(sample) for sample in group.samples]} for group in groups]
    try:
        tensors["groups"] = np.frombuffer(json.dumps(told).encode(), np.uint8)  # a header holds 100 MB at most
        save_file(tensors, folder / _FILE)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"the carried groups cannot be written to {folder / _FILE}: {error}") from error


def _facts(sample: Sample) -> dict[str, object]:
    text = sample.text if sample.finish_reason else ""  # of what goes on it is made anew
    return {"finish_reason": sample.finish_reason, "spans": sample.spans, "text": text}


def kept_carried(folder: Path, prompts: Sequence[Prompt]) -> list[Group]:
    """The groups that `keep_carried` wrote, of the prompts that they were drawn from."""
    from safetensors.numpy import load_file

    if not (folder / _FILE).exists():
        return []
    held = load_file(folder / _FILE)
    told, tokens, logprobs = json.loads(held["groups"].tobytes()), held["tokens"], held["logprobs"]
    groups, begin = [], 0
    for each in told:
        samples: list[Sample] = []
        for facts in each["samples"]:
            spans = tuple(Span(*span) for span in facts.pop("spans"))
            end = begin + sum(span.tokens for span in spans)
            samples.append(Sample(tokens=tokens[begin:end], logprobs=logprobs[begin:end], spans=spans, **facts))
            begin = end
        origin = Origin(*each["origin"])
        groups.append(replace(prompts[origin.row].group(origin), samples=tuple(samples)))
    return groups
