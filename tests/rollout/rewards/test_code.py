"""Code rewards: what of a completion is run, and what it earns."""

import gzip
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.config import CodeReward
from raylign.rollout.records import Group, Sample
from raylign.rollout.rewards.code import SandboxedCode, code_in, program_of
from raylign.rollout.rewards.functions import RewardError

ROW = {"test": ["assert twice(2) == 4", "assert twice('ab') == 'abab'"]}


def group(*texts: str, **row: Any) -> Group:
    none = np.zeros(0, np.int32)
    samples = tuple(Sample(tokens=none, logprobs=none, finish_reason="stop", text=t) for t in texts)
    return Group(step=0, index=0, prompt=none, row=row, samples=samples)


@pytest.fixture
def reward() -> Iterator[SandboxedCode]:
    with closing(SandboxedCode(CodeReward(timeout_seconds=3))) as made:
        try:
            made.wait_ready()
        except InputError as error:
            pytest.skip(str(error))
        yield made


def test_right_wrong_slow_and_loud_code(reward: SandboxedCode) -> None:
    texts = [
        "Sure:\n```python\ndef twice(x):\n    return x + x\n```\nDone.",
        "def twice(x):\n    return 2 * x",
        "```\ndef twice(x):\n    return 4\n```",
        "I cannot.",
        "while True: pass",
        "while True: print('x' * 9999)",
        "import sys\nprint('1.0')\nsys.exit(0)",
    ]
    assert list(reward.outcomes(group(*texts, **ROW))) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert reward.overruns == 1
    assert reward.counters() == {"failed": 3.0, "flood": 1.0}


def test_rows_that_cannot_be_used_are_errors(reward: SandboxedCode) -> None:
    (missing,) = reward.outcomes(group("x", answer="1"))
    assert str(missing) == "found no column 'test' in the row, which has answer"
    (broken,) = reward.outcomes(group("def f(): pass", test="assert ("))
    assert isinstance(broken, RewardError)
    assert str(broken).startswith("found tests that do not compile: SyntaxError")


def test_human_eval_by_its_columns(reward: SandboxedCode, shared_data: Path) -> None:
    config = CodeReward(entry_point="entry_point", prefix="prompt")
    with gzip.open(shared_data / "code" / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 3)]
    with closing(SandboxedCode(config)) as coded:
        for row in rows:
            whole = f"```python\n{row['prompt']}{row['canonical_solution']}```"
            texts = (row["canonical_solution"], whole, "    return None\n")
            assert list(coded.outcomes(group(*texts, **row))) == [1.0, 1.0, 0.0]


def test_the_last_block_is_the_code() -> None:
    assert code_in("```\na\n```\nor\n```py\nb\n```") == "b\n"
    assert code_in("x = 1") == "x = 1"
    config = CodeReward(prefix="prompt")
    row = {"prompt": "import math\n", "test": "assert 1"}
    assert program_of(config, "    go()", row).code == "import math\n    go()"
    assert program_of(config, "```\nx\n```", row).code == "import math\n\nx\n"
