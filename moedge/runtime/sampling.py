"""From one row of logits to one token: the settings, and the choice. Knows no model, no cache, no text.

The filters are transformers' own logits processors, in its order: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moedge.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ValueError names a setting that is out of range.

    temperature: 0 is greedy; the filters below then change nothing but the penalty.
    top_k: 0 is off. top_p: 1 is off. min_p: 0 is off; relative to the most likely token's probability.
    repetition_penalty: 1 is off; covers prompt and answer.
    seed: the same seed gives the same answer; None draws one from the system.
    stop: strings that end the answer and are not part of it.
    logprobs: None, or how many of the most likely tokens to report with each step (0: only the chosen one).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        _check("top_k", self.top_k, self.top_k >= 0 and int(self.top_k) == self.top_k, "0 (off) or a positive integer")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "positive, 1 is off")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        _check("stop", stop, all(isinstance(text, str) and text for text in stop), "strings that are not empty")
        _check("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "None, 0 or how many to report")


def _check(name: str, value: object, sound: bool, remedy: str) -> None:
    if not sound:
        raise ValueError(f"{name} is {value!r}: it must be {remedy}")


@dataclass(frozen=True)
class Choice:
    """A chosen token; log-probabilities (natural) are the model's own, before penalty, temperature and filters."""

    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...] | None


class Sampler:
    """Chooses the tokens of one answer. Holds its own random generator: no global state is read or changed.

    `forced` are processors that hold whatever the settings are, such as a model's forced first token.
    """

    def __init__(self, settings: Sampling, forced: Sequence[LogitsProcessor] = ()) -> None:
        self.settings = settings
        self._generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)
        self._always: list[LogitsProcessor] = list(forced)
        if settings.repetition_penalty != 1:
            self._always.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        self._filters: list[LogitsProcessor] = []
        if settings.top_k:
            self._filters.append(TopKLogitsWarper(int(settings.top_k)))
        if settings.top_p < 1:
            self._filters.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p:
            self._filters.append(MinPLogitsWarper(settings.min_p))

    def __call__(self, ids: Sequence[int], logits: Tensor) -> Choice:
        """The token after `ids` (prompt and answer so far), given its logits [V]."""
        raw = logits.detach().float().cpu()  # [V]
        if not torch.isfinite(raw.max()):
            raise ModelError(
                f"the logits after token {len(ids)} are not numbers: the weights are damaged, or overflow in this "
                "dtype: load with dtype bfloat16 or float32"
            )
        scores = raw[None]  # [1, V]
        if self._always:
            seen = torch.tensor([list(ids)], dtype=torch.long)
            for processor in self._always:
                scores = processor(seen, scores)
        token = int(scores[0].argmax()) if self.settings.temperature == 0 else self._draw(scores)
        if self.settings.logprobs is None:
            return Choice(token, None, None)
        logprobs = raw.log_softmax(-1)
        values, tokens = logprobs.topk(min(self.settings.logprobs, len(logprobs)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Choice(token, float(logprobs[token]), top)

    def _draw(self, scores: Tensor) -> int:
        # Subtracting the maximum keeps the smallest temperatures from overflowing.
        scores = (scores - scores.max()) / self.settings.temperature
        nothing = torch.empty(1, 0, dtype=torch.long)
        for keep in self._filters:
            scores = keep(nothing, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
