"""`python -m benchmarks NAME [--case PATTERN] [--pairs N] [--quick]`, from the root of the repository."""

import argparse
import fnmatch
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from . import results
from .harness import one_core, run_cases
from .measured import Case
from .table import write_table

BENCHMARKS = (
    "rollout",
    "group_prefill",
    "mixed_adapters",
    "exact",
    "sync",
    "controller",
    "checkpoint",
    "faults",
    "update",
    "grpo",
    "recovery",
    "overlap",
    "serve",
    "rewards",
    "gpu",
    "plan",
    "data",
)
"""Modules beside this one, imported when they are asked for: a machine with a GPU may have no Ray."""
_QUICK_PAIRS = 2


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 no such case, 130 interrupted; finished cases are in the result file in any case."""
    options = _parser().parse_args(arguments)
    if options.name == "table":
        print(write_table(options.results or results.RESULTS))
        return 0
    names = list(BENCHMARKS) if options.name == "all" else [options.name]
    chosen = {name: _chosen(name, options.case, options.quick) for name in names}
    if not any(chosen.values()):
        print(f"no case matches {options.case!r}; see --list", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for cases in chosen.values() for case in cases))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that models and servers are cleared away
    folder = options.results or (None if options.quick else results.RESULTS)
    try:
        found = _run(chosen, options.pairs or (_QUICK_PAIRS if options.quick else 10), folder)
    except KeyboardInterrupt:
        print("interrupted; finished cases are kept", file=sys.stderr)
        return 130
    print(json.dumps(found, indent=1) if options.json else "\n".join(_line(case) for case in found["cases"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "all", "table"], help="what to measure; table: write README.md")
    parser.add_argument("--case", default="*", help="only cases that match, for example '25M-fp32-p32-*-vs-generate'")
    parser.add_argument("--pairs", type=int, help="interleaved pairs a case, 10 by default")
    parser.add_argument("--quick", action="store_true", help="small cases, a few pairs; no result file by default")
    parser.add_argument("--list", action="store_true", help="names of the cases, and nothing else")
    parser.add_argument("--json", action="store_true", help="what this call measured, as JSON")
    parser.add_argument("--results", type=Path, help="folder of result files, instead of benchmarks/results")
    return parser


def _chosen(name: str, pattern: str, quick: bool) -> list[Case]:
    module = importlib.import_module(f".{name}", __package__)
    cases = module.quick_cases() if quick else module.cases()
    return [case for case in cases if fnmatch.fnmatchcase(case.name, pattern)]


def _run(chosen: dict[str, list[Case]], pairs: int, folder: Path | None) -> dict[str, Any]:
    """Measure, and write each case to its file as soon as it is finished; returns what was measured and skipped."""
    facts = {"machine": results.machine(), "versions": results.versions()}
    one_core()
    found: dict[str, Any] = {"cases": [], "skipped": {}}

    for name, cases in chosen.items():

        def done(case: dict[str, Any], name: str = name) -> None:
            found["cases"].append(case)
            if folder is not None:
                path = folder / f"{name}.json"
                results.write(path, results.merged(results.read(path), name, {**facts, "date": results.now()}, case))
                write_table(folder)

        run_cases(cases, pairs, done, found["skipped"].__setitem__)
    return found


def _line(case: dict[str, Any]) -> str:
    limit = "" if case["limit_fraction"] is None else f", {case['limit_fraction']:.0%} of the limit"
    return (
        f"{case['case']}: {case['ratio_median']:.2f} ({case['ratio_min']:.2f} … {case['ratio_max']:.2f}, "
        f"{case['pairs']} pairs), {case['ours']:,.0f} against {case['theirs']:,.0f} {case['unit']}{limit}"
    )


if __name__ == "__main__":
    sys.exit(main())
