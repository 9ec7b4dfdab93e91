"""Counters, gauges and histograms in Prometheus' text format, under vLLM's names. Knows no request and no model.

Used by one thread, the event loop's; what others count is handed over when the text is made.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """How many observations were at most each of `bounds` (ascending)."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Metrics:
    """What the event loop counts."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    refused: dict[str, int] = field(default_factory=lambda: {"queue": 0, "invalid": 0})
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(BETWEEN))
    whole: Histogram = field(default_factory=lambda: Histogram(WHOLE))

    def text(self, model: str, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
        """The page for Prometheus; `gauges` and `counters` (name without _total) are added to what is counted here."""
        page = _Page(model)
        for name, value in gauges.items():
            page.samples(name, "gauge", [("", {}, value)])
        own = {"vllm:prompt_tokens": self.prompt_tokens, "vllm:generation_tokens": self.generation_tokens}
        for name, value in (own | dict(counters)).items():
            page.samples(f"{name}_total", "counter", [("", {}, value)])
        labelled = (
            ("vllm:request_success_total", "finished_reason", self.finished),
            ("moedge:requests_refused_total", "reason", self.refused),
        )
        for name, label, counts in labelled:
            page.samples(name, "counter", [("", {label: key}, count) for key, count in counts.items()])
        page.histogram("vllm:time_to_first_token_seconds", self.first_token)
        page.histogram("vllm:inter_token_latency_seconds", self.between_tokens)
        page.histogram("vllm:e2e_request_latency_seconds", self.whole)
        return "\n".join(page.lines) + "\n"


HELP = {
    "vllm:num_requests_running": "Sequences that are being worked on.",
    "vllm:num_requests_waiting": "Sequences in the queue.",
    "vllm:kv_cache_usage_perc": "Share of the reserved contexts that is filled, 0 to 1.",
    "vllm:prompt_tokens_total": "Prompt tokens read.",
    "vllm:generation_tokens_total": "Tokens generated.",
    "vllm:request_success_total": "Sequences that ended, by reason; abort: the client left or ran out of time.",
    "vllm:time_to_first_token_seconds": "From the request to its first token, queueing included.",
    "vllm:inter_token_latency_seconds": "From one token of a sequence to its next.",
    "vllm:e2e_request_latency_seconds": "From the request to the end of its last sequence.",
    "moedge:requests_refused_total": "Requests that were not begun, by reason.",
    "moedge:expert_hits_total": "Experts that were in memory when they were needed.",
    "moedge:expert_misses_total": "Experts that had to be read.",
    "moedge:bytes_read_total": "Bytes of experts read.",
    "moedge:resident_bytes": "Bytes of the experts in memory.",
    "moedge:slots": "Experts that fit in memory.",
    "moedge:slot_bytes": "Bytes of one slot.",
}


class _Page:
    def __init__(self, model: str) -> None:
        self.lines: list[str] = []
        self._model = model

    def samples(self, name: str, kind: str, samples: Sequence[tuple[str, Mapping[str, str], float]]) -> None:
        self.lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}"]
        for suffix, labels, value in samples:
            pairs = ",".join(
                f'{key}="{_escape(text)}"' for key, text in ({"model_name": self._model} | dict(labels)).items()
            )
            self.lines.append(f"{name}{suffix}{{{pairs}}} {value}")

    def histogram(self, name: str, histogram: Histogram) -> None:
        total, samples = 0, []
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            total += count
            samples.append(("_bucket", {"le": bound}, float(total)))
        self.samples(name, "histogram", [*samples, ("_sum", {}, histogram.sum), ("_count", {}, float(total))])


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
