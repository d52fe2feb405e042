"""`benchmarks/README.md`, made from the result files."""

from pathlib import Path
from typing import Any

from .cells import matrix, overview
from .results import read

_TEXT = """\
# Benchmarks

Made by `python -m benchmarks table` from `results/`; do not edit. `make bench NAME=rollout` (or `all`) measures anew;
`python -m benchmarks --help` says how to run single cases.

A pair is one repetition of each side, one after the other in the same process tree, on one core with one thread, with
the same weights, dtype and requests; who begins alternates. `ratio` is the median of the paired ratios, ours over
theirs (above 1 is better), with its range, and again by the CPU seconds of each side, which other load on the machine
changes little. `limit` is ours as a share of what the machine allows at most: for rates, all matrix products of the
model's own shapes alone at the best speed torch reaches (measured before every pair; compared by CPU seconds too); for
`group_prefill`, the ratio G(p+c)/(p+Gc). For `update` the products are those of forward and backward, with the prompt
of a group once and the head at completion tokens. For `overlap`, whose roles only take their time (g seconds of
generation, u of update, n steps), the limit is the ratio n(g+u)/(g+(n−1)max(g,u)+u).

EOS is off, sampling is at T = 1, and only tokens that a request asked for count. Prompts are new in every pair, so no
cache knows them. Lognormal lengths have sigma 0.8 and are clipped to median/8 … 4 median; the sizes of each case stand
in the JSON, with every pair. `generate` is TRL's GRPO path: one left-padded batch, to the longest completion. vLLM and
ours also return the log-prob of every token, the others do not.

`update`: TRL's loss path without gradient checkpointing in micro-batches of eight (`trl`) or in one (`trl-whole`), and
with checkpointing (`trl-defaults`), its default. A real token is one of a sample, not padding. Gradients are compared
before anything is measured, and their gap and the peaks of memory stand in the JSON. `grpo`: a pair is a whole run of
each side on all cores, with its number as seed; phases, curves and time to a reward stand in the JSON.

`gpu`: the same on a GPU with all cores, without Ray, on a random model of half a billion parameters; the limit of
`rollout` there is reading all weights once for every token of the longest completion.
"""

_CHAOS = """\
`make chaos`: seconds from a fault to the end of the next step; first the range over the phases and their number, then
each. A fault comes as the role begins its part of a phase or, where it has none, as the loop enters it; the policy has
two ranks. Where it took 0 s, others did the work, or only the step after needed the role. A run ended with the metrics,
samples and weights of the undisturbed one and left no process, unless a cell says that it differs. *resumed*: the run
ended with its reason, as it should where the disk is full, and `resume` went on.
"""

_RECOVERY = """\
A SIGKILL at the beginning of a phase in which the step waits for that role; PPO with two rollout workers, two ranks of
the policy and a reference, on all cores.
"""

_GOODPUT = """\
Goodput of GRPO whose policy dies every M seconds: the share of the time that went into steps that stay, against the
formula 1 − δ/τ − (τ/2 + R)/M with the run's own numbers.

| goodput | formula | kills | M | τ | δ | R |
|---|---|---|---|---|---|---|"""

_COLUMNS = ("case", "ratio", "range", "by CPU seconds", "pairs", "ours", "theirs", "unit", "limit")


def render(results: list[dict[str, Any]]) -> str:
    """The page: one table a result file."""
    return "\n".join([_TEXT, *(_section(result) for result in results if result["cases"])])


def _section(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    memory = f", {machine['memory_gb']} GB" if "memory_gb" in machine else ""
    about = (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['gpu'] or 'no GPU'}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {result['date']}"
    )
    table = _TABLES.get(result["name"], _ratios)(result["cases"])
    return "\n".join([f"## {result['name']}", "", about, "", table, ""])


def _ratios(cases: list[dict[str, Any]]) -> str:
    head = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"
    return "\n".join([head, *(_line(case) for case in cases)])


def _chaos(cases: list[dict[str, Any]]) -> str:
    return f"{_CHAOS}\n{overview(cases)}\n\n{matrix(cases)}"


def _recovery(cases: list[dict[str, Any]]) -> str:
    head = (
        "| killed | seconds to the end of the next step | kills | seconds of an undisturbed step |\n|---|---|---|---|"
    )
    by_role = [_of_role(case) for case in cases if not case["settings"].get("measured")]
    whole = [_of_goodput(m) for case in cases for m in case["settings"].get("measured", ())]
    return "\n".join([_RECOVERY, head, *by_role, "", _GOODPUT, *whole])


def _of_role(case: dict[str, Any]) -> str:
    seconds = [pair["ours_seconds"] for pair in case["raw"]]
    role = case["case"].removesuffix("-killed")
    spread = f"{min(seconds):.1f} … {max(seconds):.1f}" if len(seconds) > 1 else f"{seconds[0]:.1f}"
    return f"| {role} | {spread} | {len(seconds)} | {1 / case['theirs']:.2f} |"


def _of_goodput(m: dict[str, Any]) -> str:
    seconds = " | ".join(f"{m[key]:.2f}" for key in ("between", "tau", "delta", "recovery"))
    return f"| {m['useful'] / m['wall']:.2f} | {m['formula']:.2f} | {m['kills']} | {seconds} |"


_TABLES = {"chaos": _chaos, "recovery": _recovery}
"""How the results that are no ratios are shown."""


def _line(case: dict[str, Any]) -> str:
    fraction = case["limit_fraction"]
    cells = [
        case["case"],
        f"**{case['ratio_median']:.2f}**",
        f"{case['ratio_min']:.2f} … {case['ratio_max']:.2f}",
        f"{case['ratio_cpu_median']:.2f}",
        str(case["pairs"]),
        _number(case["ours"]),
        _number(case["theirs"]),
        case["unit"],
        "" if fraction is None else f"{fraction:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_table(results: Path) -> Path:
    """Write the page beside the folder of result files; returns its path."""
    page = results.parent / "README.md"
    page.write_text(render([read(path) for path in sorted(results.glob("*.json"))]))
    return page
