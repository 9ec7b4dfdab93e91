"""What a smaller model is worth on a task's test part: KL from the full model, agreement, perplexity, accuracy.

The full model's logits are recorded once and serve any number of candidates; the models are never in memory together.
Knows no importance and no budget. Letters: t positions, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from moedge.compress.samples import SampleWindow, Task, Windows, windows
from moedge.errors import DataError, ModelError
from moedge.measure.compare import Recording, kl_divergence
from moedge.measure.quality import target_logprobs, window_size
from moedge.measure.tasks import Judge
from moedge.runtime.forward import logits_at, vocabulary
from moedge.runtime.generate import logits_in_chunks
from moedge.runtime.session import EncodedSession, Model, Session, check_ids, context_of

UNTRAINED = 0.9  # of the largest entropy; mini's predictions have 0.2 to 0.6 of it, a random model's all but all
LOGITS_ON_DISK = 1 << 30  # bytes of recorded logits; of a task that has more, the first windows are measured
Note = Callable[[str], None]


@dataclass(frozen=True)
class Quality:
    """What was measured of one model on one task.

    perplexity, bits_per_byte, kl (nats a token from the full model), top1_agreement (share of tokens with the same
    likeliest successor): of all `tokens` predicted. perplexity_answer, kl_answer, top1_answer: of the answers' tokens.
    accuracy: share of the `n` questions answered rightly; chance: what guessing among the choices gets, 0 without
    choices. What a text or an encoder-decoder does not have is None.
    """

    perplexity: float
    bits_per_byte: float | None
    kl: float
    top1_agreement: float
    tokens: int
    n: int
    perplexity_answer: float | None = None
    kl_answer: float | None = None
    top1_answer: float | None = None
    accuracy: float | None = None
    chance: float | None = None

    def retained(self, full: "Quality") -> float | None:
        """(accuracy - chance) / (the full model's accuracy - chance); None where that model only guesses."""
        if self.accuracy is None or full.accuracy is None or full.chance is None or full.accuracy <= full.chance:
            return None
        return (self.accuracy - full.chance) / (full.accuracy - full.chance)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    """Over predicted tokens: nats of loss, nats of KL, agreed successors."""

    tokens: int = 0
    nats: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, nats: Tensor, kl: Tensor, agreed: Tensor) -> None:
        self.tokens += len(nats)
        self.nats += float(nats.double().sum())
        self.kl += float(kl.double().sum())
        self.agreed += int(agreed.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.tokens, 700.0))  # a float ends at exp(709)


class Reference:
    """The full model's logits on a task, in a temporary file until this is closed, and its own quality."""

    def __init__(self, task: Task, some: Windows, size: int | None) -> None:
        self.task, self.windows, self.size = task, some, size
        self.recording = Recording()
        self.quality: Quality  # set by `of`, as the next
        self.nats = self.guess_nats = 0.0  # a token, of the full model and of a guesser that only counts tokens
        self.entropy = 0.0  # mean of the full model's predictions, as a share of the largest possible

    @classmethod
    def of(cls, lm: Model, task: Task, disk: int = LOGITS_ON_DISK, note: Note = lambda _: None) -> "Reference":
        """Run the full model over the task's samples. `disk`: bytes that its logits may take; `note` gets progress.

        Raises DataError where the samples make no windows (see samples.windows), or the disk is full.
        """
        size = None if lm.model.config.is_encoder_decoder else window_size(lm)
        most = disk // (vocabulary(lm.model) * lm.model.dtype.itemsize)
        some = _up_to(_windows(lm, task, size), most)
        reference = cls(task, some, size)
        try:
            sums, entropies = (_Sums(), _Sums()), list[Tensor]()
            for count, (window, logits) in enumerate(_read(lm, task, some), start=1):
                kept = ((piece, piece) for piece in _seen(reference.recording.keep(window, logits), entropies))
                _add(sums, window, kept)
                note(f"{count} of {len(some)} windows")
            reference.quality = _quality(lm, task, some, sums, note)
            reference.nats = sums[0].nats / sums[0].tokens
            reference.guess_nats = guess_nats(some, vocabulary(lm.model))
            reference.entropy = float(torch.cat(entropies).mean()) / math.log(vocabulary(lm.model))
        except BaseException:
            reference.close()
            raise
        return reference

    def close(self) -> None:
        self.recording.close()

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(lm: Model, task: Task, reference: Reference, note: Note = lambda _: None) -> Quality:
    """The quality of a candidate on the task of which `reference` has the full model's logits.

    Raises DataError where that is another task, or the candidate has another tokenizer or vocabulary.
    """
    if task.fingerprint != reference.task.fingerprint:
        raise DataError(
            f"task {task.name!r} with {len(task)} samples is not what the reference was recorded on, "
            f"{reference.task.name!r} with {len(reference.task)}: record it again"
        )
    reference.recording.rewind()
    sums, some = (_Sums(), _Sums()), reference.windows
    own = _windows(lm, task, reference.size)  # by this model's tokenizer, so that another one is noticed
    for count, (window, logits) in enumerate(_read(lm, task, _first(own, len(some))), start=1):
        _add(sums, window, _beside(reference.recording, window, logits))
        note(f"{count} of {len(some)} windows")
    return _quality(lm, task, some, sums, note)


def check_reads(reference: Reference) -> None:
    """DataError where the full model cannot read the samples: then nothing it does on them says what to keep.

    Its perplexity must be at most half of a guesser's that knows only how often each token stood before
    (`guess_nats`). The guesser learns from the samples themselves, so a model that saves less than a bit a token has
    little to say about them; on few samples it has seen little and is bad, so that a short but ordinary text passes.
    (Mini saves 1.8 bits or more on what it has learnt, JSON the least; 0.2 on Swedish, -0.4 on Czech, -2.7 on a
    cipher.) A model that answers well above chance (two standard errors) does read, however odd the form. One whose
    predictions are nearly uniform was not trained at all: there is no text that it reads.
    """
    quality = reference.quality
    if reference.entropy > UNTRAINED:
        return
    if quality.accuracy is not None and quality.chance is not None:
        error = math.sqrt(max(quality.chance * (1 - quality.chance), 1 / quality.n) / quality.n)
        if quality.accuracy > quality.chance + 2 * error:
            return
    if reference.nats > reference.guess_nats - math.log(2):
        guess = math.exp(reference.guess_nats)
        raise DataError(
            f"the full model cannot read the samples of task {reference.task.name!r}: its perplexity is "
            f"{quality.perplexity:.4g}, counting the {quality.tokens} tokens alone gets {guess:.4g}, and half of that "
            "is needed: give samples in a language and of a kind that the model was made for, or --force"
        )


def _seen(logits: Iterable[Tensor], entropies: list[Tensor]) -> Iterator[Tensor]:
    """Hands pieces [t, V] on; their entropies [t] go to `entropies`, in nats."""
    for piece in logits:
        logs = piece.float().log_softmax(-1)
        entropies.append(-(logs.exp() * logs).sum(-1).cpu())
        yield piece


def guess_nats(some: Iterable[SampleWindow], words: int) -> float:
    """Nats a token of a guesser that counts the tokens before, of a vocabulary of `words`.

    Witten and Bell (1991), method C: after n tokens of d kinds, one seen c times has c / (n + d), all new ones
    together d / (n + d).
    """
    counts: Counter[int] = Counter()
    nats, n = 0.0, 0
    for window in some:
        for token in window.ids[1:]:
            kinds, seen = len(counts), counts[token]
            if not n:
                nats += math.log(words)
            elif seen:
                nats -= math.log(seen / (n + kinds))
            else:
                nats -= math.log(kinds / (n + kinds) / max(1, words - kinds))
            counts[token] += 1
            n += 1
    return nats / max(1, n)


def _add(sums: tuple[_Sums, _Sums], window: SampleWindow, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add a window's expected and own logits [t, V], in pieces, to the sums over all tokens and over the answers'."""
    at = 0
    for expected, piece in pairs:
        expected, piece = expected.cpu(), piece.cpu()
        targets = torch.tensor(window.ids[at + 1 : at + 1 + len(piece)])
        nats, agreed = -target_logprobs(piece, targets), expected.argmax(-1) == piece.argmax(-1)  # [t], [t]
        kl = torch.zeros(len(piece)) if expected is piece else kl_divergence(expected, piece)  # [t]
        for some, first in zip(sums, (0, max(0, window.first - at)), strict=True):
            some.add(nats[first:], kl[first:], agreed[first:])
        at += len(piece)


def _beside(recording: Recording, window: SampleWindow, logits: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The recorded logits and the model's."""
    recording.expect(window)
    for piece in logits:
        yield recording.take(*piece.shape), piece


def _quality(lm: Model, task: Task, some: Windows, sums: tuple[_Sums, _Sums], note: Note) -> Quality:
    every, answers = sums
    if not math.isfinite(every.nats):
        raise ModelError(
            f"the model's logits on task {task.name!r} are not all numbers: it is damaged, or its weights need a dtype "
            "of a larger range, such as fp32"
        )
    nbytes = sum(window.nbytes for window in some)
    questions = task.kind == "questions"
    return Quality(
        perplexity=every.perplexity,
        bits_per_byte=every.nats / math.log(2) / nbytes if nbytes else None,
        kl=every.kl / every.tokens,
        top1_agreement=every.agreed / every.tokens,
        tokens=every.tokens,
        n=len(task),
        perplexity_answer=answers.perplexity if questions else None,
        kl_answer=answers.kl / answers.tokens if questions else None,
        top1_answer=answers.agreed / answers.tokens if questions else None,
        accuracy=_accuracy(lm, task, note) if questions else None,
        chance=chance_of(task) if questions else None,
    )


def _accuracy(lm: Model, task: Task, note: Note) -> float:
    right = 0
    verdicts = Judge(lm, task.template).verdicts(sample.example for sample in task.samples)
    for count, verdict in enumerate(verdicts, start=1):
        right += verdict.correct
        note(f"{count} of {len(task)} questions, accuracy {right / count:.3f}")
    return right / len(task)


def chance_of(task: Task) -> float:
    """The accuracy that guessing among the choices gets; a free answer is not to be guessed."""
    return sum(1 / len(sample.choices) if sample.choices else 0.0 for sample in task.samples) / len(task)


def _windows(lm: Model, task: Task, size: int | None) -> Windows:
    """The task's windows. An encoder-decoder's are the answers alone: what its decoder writes after the prompt."""
    if not lm.model.config.is_encoder_decoder:
        return windows(task, lm.tokenizer, size)
    if task.kind == "text":
        raise DataError(f"task {task.name!r} is a text, but {type(lm.model).__name__} answers questions: give those")
    found = []
    for number, sample in enumerate(task.samples):
        answer = (sample.answer or "").strip()
        ids = lm.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(SampleWindow((0, *ids), float(len(answer.encode())), 0, number))  # 0: stands for the start token
    return Windows(tuple(found), 0, 0)


def _up_to(some: Windows, tokens: int) -> Windows:
    """The first windows with at most so many predicted tokens, at least one window."""
    count = total = 0
    for window in some:
        total += len(window.ids) - 1
        if count and total > tokens:
            break
        count += 1
    return _first(some, count)


def _first(some: Windows, count: int) -> Windows:
    return Windows(some.windows[:count], some.cut, some.split)


def _read(lm: Model, task: Task, some: Windows) -> Iterator[tuple[SampleWindow, Iterator[Tensor]]]:
    """Each window with the logits [t, V] of its positions but the last, in pieces, to be taken at once."""
    pieces = _encoded(lm, task, some) if lm.model.config.is_encoder_decoder else _pieces(lm, some)
    for number, found in groupby(pieces, key=itemgetter(0)):
        yield some.windows[number], (piece for _, piece in found)


def _pieces(lm: Model, some: Windows) -> Iterator[tuple[int, Tensor]]:
    """(number of the window, logits [t, V]); windows that fit together into the prefill chunk share a pass."""
    room, session = min(lm.prefill_chunk, context_of(lm) or lm.prefill_chunk), Session(lm)
    waiting: list[int] = []
    longest = 0
    for number, window in enumerate(some):
        check_ids(lm, window.ids)
        length = len(window.ids) - 1
        if waiting and max(longest, length) * (len(waiting) + 1) > room:
            yield from _together(lm, some.windows, waiting)
            waiting, longest = [], 0
        if length > room:
            yield from ((number, piece) for piece in logits_in_chunks(lm, window.ids[:-1], session=session))
        else:
            waiting.append(number)
            longest = max(longest, length)
    if waiting:
        yield from _together(lm, some.windows, waiting)


def _together(lm: Model, some: Sequence[SampleWindow], numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    rows = [some[number].ids[:-1] for number in numbers]
    owners = [number for number, row in zip(numbers, rows, strict=True) for _ in row]
    at = 0
    for logits in logits_at(
        lm.model, rows, [(row, place) for row, ids in enumerate(rows) for place in range(len(ids))]
    ):
        for number, places in groupby(range(at, at + len(logits)), key=owners.__getitem__):
            own = list(places)
            yield number, logits[own[0] - at : own[-1] + 1 - at]
        at += len(logits)


def _encoded(lm: Model, task: Task, some: Windows) -> Iterator[tuple[int, Tensor]]:
    """As `_pieces`, of an encoder-decoder: the prompt is encoded, the answer decoded token by token."""
    session = EncodedSession(lm)
    for number, window in enumerate(some):
        prompt = task.samples[window.sample].prompt
        logits = session.begin(list(lm.tokenizer(prompt, verbose=False)["input_ids"]))
        yield number, logits[None]
        for token in window.ids[1:-1]:
            yield number, session.push(token)[None]
