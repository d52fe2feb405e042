"""Runs as Ray jobs: submitted once by name, followed to their end, stopped.

A job's status is the truth, not its log stream, which may break or end early. Ray runs a job once and refuses an id
that was used: another attempt of a run is another job, and its metadata says which run it belongs to.
"""

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .auth import read_token, token_file
from .errors import ClusterUnreachable, InputError, NotFound, RaylignError, RunFailed
from .rundir import FINAL
from .session import require_listener, wrong_token

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

UPLOAD_LIMIT = 512 * 2**20
"""The most bytes that Ray takes as a job's working directory."""

NOT_SENT = (".git", ".venv", "venv", "__pycache__", "/runs", "/wandb")
"""What stays behind when a working directory is sent, as .gitignore patterns."""

_RUN, _ATTEMPT = "raylign_run", "raylign_attempt"
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_STOP_SECONDS = 30
"""How long a stopped run has for its checkpoint before Ray kills it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt of a run: `status` is `pending`, `running`, `succeeded`, `failed` or `stopped`."""

    submission_id: str
    run: str
    attempt: int
    status: str
    message: str = ""
    driver_exit_code: int | None = None

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    @property
    def exit_code(self) -> int:
        """What a command that followed it exits with: 0, the code the run ended with, or 1."""
        if self.status == "succeeded":
            return 0
        code = self.driver_exit_code or 1
        return code if code in range(1, 6) else 1


class Jobs:
    """The jobs of one cluster, by the URL of its dashboard, such as `http://127.0.0.1:8265`.

    The token is this user's (see `auth`). Raises `ClusterUnreachable` where nothing answers or the token is refused.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        host, port = _host_and_port(self.address)
        require_listener(host, port, self.address)
        self._client = self._connect(host)

    def _connect(self, host: str) -> "JobSubmissionClient":
        from ray.job_submission import JobSubmissionClient

        for chatty in _CHATTY:
            logging.getLogger(chatty).setLevel(logging.WARNING)
        token = read_token()
        headers = {"Authorization": f"Bearer {token}"} if token else None
        with _explained(self.address), _address_as_given(host):
            return JobSubmissionClient(self.address, headers=headers)

    def attempts(self, run: str) -> list[Job]:
        """The jobs that belong to a run, oldest first."""
        with _explained(self.address):
            found = [_job(d) for d in self._client.list_jobs() if (d.metadata or {}).get(_RUN) == run]
        return sorted(found, key=lambda job: job.attempt)

    def submit(
        self,
        run: str,
        entrypoint: str,
        *,
        working_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        wheels: Sequence[Path] = (),
    ) -> tuple[Job, bool]:
        """Start a run as a job, unless it is running or has succeeded; gives the job and whether it is new.

        After a failed or stopped attempt it starts another. `working_dir` is sent with what lies in it (`NOT_SENT`
        stays behind); `wheels` are installed for the job. Raises `InputError` if the folder is larger than Ray takes.
        """
        before = self.attempts(run)
        if before and before[-1].status not in ("failed", "stopped"):
            return before[-1], False
        if working_dir:
            _require_small(working_dir)
        attempt = before[-1].attempt + 1 if before else 1
        request = {
            "entrypoint": entrypoint,
            "submission_id": f"raylign-{run}-{attempt}",
            "metadata": {_RUN: run, _ATTEMPT: str(attempt)},
            "runtime_env": _runtime_env(working_dir, env or {}, wheels),
        }
        try:
            with _explained(self.address), _everything_is_sent():
                self._client.submit_job(**request)
        except RunFailed as error:
            if "already exists" not in str(error):
                raise
            return self.attempts(run)[-1], False  # another client was faster
        return self.status(request["submission_id"]), True

    def status(self, submission_id: str) -> Job:
        """What a job is now. Raises `NotFound`."""
        with _explained(self.address):
            return _job(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """What a job has printed so far."""
        with _explained(self.address):
            return self._client.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end (SIGTERM, and SIGKILL after half a minute); false if it had ended."""
        with _explained(self.address):
            return self._client.stop_job(submission_id)

    def follow(self, submission_id: str, write: Callable[[str], None], *, skip: int = 0, patience: float = 60.0) -> Job:
        """Write what a job prints until it ends, leaving out the first `skip` characters; gives the ended job.

        Connects again when the stream breaks or ends early. Raises `ClusterUnreachable` when nothing has answered for
        `patience` seconds; the job itself goes on then.
        """
        reader = _Reader(write, skip)
        job = asyncio.run(self._follow(submission_id, reader, patience))
        reader.begin()
        reader.feed(self.logs(submission_id))
        return job

    async def _follow(self, submission_id: str, reader: "_Reader", patience: float) -> Job:
        import aiohttp

        answered = time.monotonic()
        while True:
            try:
                await self._stream(submission_id, reader)
                job = self.status(submission_id)
                if job.final:
                    return job
                answered = time.monotonic()
            except NotFound:
                raise
            except (aiohttp.ClientError, OSError, RuntimeError, RaylignError) as error:
                if time.monotonic() - answered > patience:
                    raise ClusterUnreachable(
                        f"{self.address} has not answered for {patience:g} s ({error}); the job may go on: "
                        "try again later"
                    ) from error
            await asyncio.sleep(0.5)

    async def _stream(self, submission_id: str, reader: "_Reader") -> None:
        """Feed the reader until the stream ends, or the job has while the stream is silent."""
        reader.begin()
        stream = self._client.tail_job_logs(submission_id)
        waiting: asyncio.Future[str] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(stream))
                done, _ = await asyncio.wait({waiting}, timeout=10)
                if not done:
                    if (await asyncio.to_thread(self.status, submission_id)).final:
                        return
                    continue
                text, waiting = waiting.result(), None
                reader.feed(text)
        except StopAsyncIteration:
            return
        finally:
            if waiting and not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()


class _Reader:
    """Writes a log that arrives from its beginning again after every new connection, each character once."""

    def __init__(self, write: Callable[[str], None], seen: int) -> None:
        self._write = write
        self._seen = seen
        self._at = 0

    def begin(self) -> None:
        """What comes next is the log's beginning."""
        self._at = 0

    def feed(self, text: str) -> None:
        """Write what has not been written yet."""
        fresh = text[max(0, self._seen - self._at) :]
        self._at += len(text)
        self._seen = max(self._seen, self._at)
        if fresh:
            self._write(fresh)


def is_loopback(address: str) -> bool:
    """Whether a URL points at this machine. Raises `InputError` if it is none."""
    return _is_loopback(_host_and_port(address)[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"address {address!r} needs the form http://HOST:PORT, such as http://127.0.0.1:8265")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def _job(details: "JobDetails") -> Job:
    metadata = details.metadata or {}
    return Job(
        submission_id=details.submission_id or "",
        run=metadata.get(_RUN, ""),
        attempt=int(metadata.get(_ATTEMPT, 1)),
        status=details.status.value.lower(),
        message=details.message or "",
        driver_exit_code=details.driver_exit_code,
    )


def _runtime_env(working_dir: Path | None, env: Mapping[str, str], wheels: Sequence[Path]) -> dict[str, Any]:
    made: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), **env}}
    if working_dir:
        made |= {"working_dir": str(working_dir), "excludes": list(NOT_SENT)}
    if wheels:
        made["py_modules"] = [str(wheel) for wheel in wheels]
    return made


def _require_small(folder: Path) -> None:
    sizes: dict[str, int] = {}
    hidden = {pattern for pattern in NOT_SENT if not pattern.startswith("/")}
    for at, names, files in os.walk(folder):
        names[:] = [n for n in names if n not in hidden and not (Path(at) == folder and f"/{n}" in NOT_SENT)]
        for file in files:
            path = Path(at) / file
            if path.is_file():
                part = path.relative_to(folder).parts[0]
                sizes[part] = sizes.get(part, 0) + path.stat().st_size
    total = sum(sizes.values())
    if total > UPLOAD_LIMIT:
        largest = max(sizes, key=lambda part: sizes[part])
        raise InputError(
            f"{folder} holds {total / 2**20:.0f} MiB and a job may bring {UPLOAD_LIMIT / 2**20:.0f}; "
            f"the largest part is {largest} ({sizes[largest] / 2**20:.0f} MiB): "
            "move it to storage that the cluster shares"
        )


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Ray's errors as ours."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        hint = "" if read_token() else f" (there is no token in {token_file()})"
        raise ClusterUnreachable(wrong_token(address) + hint) from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterUnreachable(f"the jobs API at {address} does not answer: {error}") from None
    except RuntimeError as error:
        if isinstance(error, RaylignError):
            raise
        if "status code 404" in str(error):
            raise NotFound(
                f"no such job at {address}: the cluster is not the one it was submitted to, or is new"
            ) from None
        raise RunFailed(f"{address} refused: {error}") from None


@contextmanager
def _address_as_given(host: str) -> Iterator[None]:
    """Keep the environment from replacing the address: Ray prefers its own variables, `requests` a proxy."""
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    if _is_loopback(host):
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


@contextmanager
def _everything_is_sent() -> Iterator[None]:
    """Data that git ignores belongs to the run all the same."""
    name = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
