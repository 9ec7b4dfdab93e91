"""What an answer took: Steps added up into the figures that people and programs are shown. Knows no model."""

from dataclasses import dataclass, field
from typing import Any

from moedge.runtime.device import process_memory
from moedge.runtime.generate import Step
from moedge.units import format_size


@dataclass
class Tally:
    """The sums over the Steps of one answer, or of several."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    first_token_seconds: float | None = None
    finish: str | None = None

    def add(self, step: Step) -> None:
        self.text += step.text
        self.tokens.append(step.token)
        self.hits += step.hits
        self.misses += step.misses
        self.bytes_read += step.bytes_read
        self.seconds += step.seconds
        if self.first_token_seconds is None:
            self.first_token_seconds = step.seconds
        self.finish = step.finish

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts asked for that were in memory; None when none was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole answer, reading the prompt included."""
        return len(self.tokens) / self.seconds if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `tokens` is their number; sizes in bytes, of the whole answer and of the process's peak."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "hit_rate": self.hit_rate,
            "bytes_read": self.bytes_read,
            "peak_memory": process_memory()[1],
            "seconds": self.seconds,
            "hits": self.hits,
            "misses": self.misses,
            "finish": self.finish,
            "token_ids": self.tokens,
        }

    def line(self) -> str:
        """For people: one line."""
        if not self.tokens:
            return f"no tokens, peak memory {format_size(process_memory()[1])}"
        hits = "no experts asked for" if self.hit_rate is None else f"hit rate {100 * self.hit_rate:.1f}%"
        return (
            f"{len(self.tokens)} tokens, {self.tokens_per_second or 0:.3g} tokens/s, "
            f"first after {self.first_token_seconds:.2g} s, {hits}, "
            f"{format_size(self.bytes_read / len(self.tokens))} read per token, "
            f"peak memory {format_size(process_memory()[1])}"
        )
