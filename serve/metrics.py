"""What a replica counts, for Prometheus: requests by route and status, tokens, and how long answers take."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The numbers of one replica, in a collection of their own: several may live in one process."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        self.requests = Counter("raylign_requests", "Requests answered", ["route", "status"], registry=self._all)
        tokens = Counter("raylign_tokens", "Tokens of prompts and completions", ["kind"], registry=self._all)
        self.prompt_tokens, self.completion_tokens = tokens.labels("prompt"), tokens.labels("completion")
        self.first_token = Histogram(
            "raylign_first_token_seconds", "From a request to its first token", registry=self._all, buckets=_SECONDS
        )
        self.answer = Histogram(
            "raylign_answer_seconds", "From a request to its last token", registry=self._all, buckets=_SECONDS
        )
        self._completions = Gauge("raylign_completions", "Completions that run or wait", registry=self._all)
        self._adapters = Gauge("raylign_adapters", "Adapters that the engine holds", registry=self._all)

    def page(self, *, completions: int, adapters: int) -> bytes:
        """All of them in Prometheus' text format."""
        self._completions.set(completions)
        self._adapters.set(adapters)
        return generate_latest(self._all)
