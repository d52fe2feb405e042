"""Adapter folders made to harm are refused with what is wrong with them, with and without `assert` statements."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = {
    "pickle beside it": "can run code",
    "header of 2^63 bytes": "is broken",
    "truncated": "is broken",
    "NaN": "not finite",
    "rank 10^6 in the config": "has rank 1000000",
    "rank 10^6 in a pattern": "has rank 1000000",
    "rank 10^6 in the weights": "has rank 1000000",
    "another base": "was made for base ffffffffffff",
    "link out of the folder": "is a link",
    "other weights": "not what its name says",
    "other scale": "not what its name says",
    "nested config": "is not JSON",
    "huge config": "5242880 bytes",
    "config that is no object": "must hold a JSON object",
    "swapped after its check": "not what its name says",
}


@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["plain", "python -O"])
def test_folders_made_to_harm_are_refused(tiny_model: Path, flags: tuple[str, ...]) -> None:
    script = Path(__file__).with_name("file_attacks.py")
    done = subprocess.run(
        [sys.executable, *flags, str(script), str(tiny_model)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("at once") == {"uploads": 8, "digests": 1, "moves": 1, "left": 0}
    assert said.pop("registered") == 0
    assert said.keys() == SAYS.keys()
    for name, part in SAYS.items():
        assert said[name].startswith("InputError"), name
        assert part in said[name], name
