"""A home of its own, for tests that start clusters."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylign.cluster.auth import refresh_ray


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own: the token and the state of clusters."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAYLIGN_HOME", str(folder / "raylign"))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.setenv("RAY_AUTH_MODE", "token")
        yield folder
    refresh_ray()  # this process's own Ray asks for no token
