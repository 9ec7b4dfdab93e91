"""Quality against the definitions; a model is no distance from itself; texts that a model cannot read are refused."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_lm import FakeLM, tiny_lm, tokenizer, without
from torch.nn import functional

from moedge.compress.evaluate import Quality, Reference, chance_of, check_reads, guess_nats, measure
from moedge.compress.samples import Sample, SampleWindow, Task, windows
from moedge.errors import DataError, ModelError
from moedge.runtime import forward

CHOICES = (" calm", " the old moon", " slept")
PROMPTS = ("The sea was", "Hello world, hello", "The old man")
CHOSEN = tuple(Sample(prompt, choice, CHOICES) for prompt, choice in zip(PROMPTS, CHOICES, strict=True))
QUESTIONS = Task("sea", (*CHOSEN, Sample("12 + 7 =", " 19")), "questions")
TEXT = Task("words", (Sample("The sea was calm and the old man slept. " * 4), Sample("Größe, naïve")), "text")


def by_hand(reference: FakeLM, lm: FakeLM, task: Task, size: int) -> dict[str, float]:
    """Each window run by itself, in double precision."""
    sums = dict.fromkeys(("kl", "kl_answer", "nats", "nats_answer", "agreed", "tokens", "answers"), 0.0)
    for window in windows(task, lm.tokenizer, size):
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            p, q = (m.model(ids).logits[0, :-1].double().log_softmax(-1) for m in (reference, lm))
        kl = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        nats = -q.gather(-1, ids[0, 1:, None])[:, 0]
        counted = torch.from_numpy(window.mask[:-1])
        sums["kl"] += float(kl.sum())
        sums["kl_answer"] += float(kl[counted].sum())
        sums["nats"] += float(nats.sum())
        sums["nats_answer"] += float(nats[counted].sum())
        sums["agreed"] += int((p.argmax(-1) == q.argmax(-1)).sum())
        sums["tokens"] += len(nats)
        sums["answers"] += int(counted.sum())
    return sums


@pytest.mark.parametrize("task", [QUESTIONS, TEXT], ids=["questions", "text"])
@pytest.mark.parametrize("chunk", [3, 24, 512])
def test_quality_is_the_definition(task: Task, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "LOGITS_BYTES", 320 * 4 * 5)  # a pass of several windows gives several pieces
    reference, lm = tiny_lm(seed=0), tiny_lm(seed=1)
    reference.context = lm.context = 24  # the text becomes several windows
    reference.prefill_chunk = lm.prefill_chunk = chunk  # windows alone, in pieces, and together
    with Reference.of(reference, task) as recorded:
        found = measure(lm, task, recorded)
    sums = by_hand(reference, lm, task, 24)
    tokens = sums["tokens"]
    assert found.tokens == recorded.quality.tokens == tokens
    assert found.kl == pytest.approx(sums["kl"] / tokens, rel=1e-4)
    assert found.top1_agreement == pytest.approx(sums["agreed"] / tokens)
    assert found.perplexity == pytest.approx(math.exp(sums["nats"] / tokens), rel=1e-4)
    nbytes = sum(window.nbytes for window in windows(task, tokenizer(), 24))
    assert found.bits_per_byte == pytest.approx(sums["nats"] / math.log(2) / nbytes, rel=1e-4)
    if task.kind == "questions":
        assert found.kl_answer == pytest.approx(sums["kl_answer"] / sums["answers"], rel=1e-4)
        assert found.perplexity_answer == pytest.approx(math.exp(sums["nats_answer"] / sums["answers"]), rel=1e-4)
        assert found.kl_answer != pytest.approx(found.kl, rel=1e-3)
    else:
        assert (found.kl_answer, found.accuracy, found.chance, found.retained(recorded.quality)) == (None,) * 4


def test_a_model_is_no_distance_from_itself_and_a_reference_serves_many() -> None:
    lm, other = tiny_lm(), tiny_lm(seed=1)
    with Reference.of(lm, QUESTIONS) as reference:
        first = measure(other, QUESTIONS, reference)
        same = measure(lm, QUESTIONS, reference)
        assert (same.kl, same.kl_answer, same.top1_agreement) == (0, 0, 1)
        assert same == reference.quality
        assert measure(other, QUESTIONS, reference) == first
        assert first.kl > 0


def test_accuracy_and_chance_are_of_the_questions() -> None:
    lm = tiny_lm()
    with Reference.of(lm, QUESTIONS) as reference:
        right = reference.quality.accuracy
    assert chance_of(QUESTIONS) == pytest.approx(0.25)  # three of four have three choices
    assert right in (0, 0.25, 0.5, 0.75, 1)
    answered = Task(
        "a", tuple(Sample(s.prompt, c, CHOICES) for s in QUESTIONS.samples[:1] for c in CHOICES), "questions"
    )
    with Reference.of(lm, answered) as reference:
        assert reference.quality.accuracy == pytest.approx(1 / 3)  # of three answers to one question one is given


def quality(accuracy: float | None, chance: float | None = 0.5) -> Quality:
    return Quality(2.0, 1.0, 0.1, 0.9, 10, 4, accuracy=accuracy, chance=chance)


def test_what_is_retained_is_above_chance() -> None:
    assert quality(0.7).retained(quality(0.9)) == pytest.approx(0.5)
    assert quality(0.5).retained(quality(0.9)) == 0
    assert quality(0.9).retained(quality(0.5)) is None  # the full model only guesses
    assert quality(None, None).retained(quality(0.9)) is None


def test_other_samples_another_tokenizer_or_vocabulary_are_errors() -> None:
    with Reference.of(tiny_lm(vocab_size=330), TEXT) as reference:
        with pytest.raises(DataError, match="not what the reference was recorded on"):
            measure(tiny_lm(vocab_size=330), TEXT.take(0, 1), reference)
        other = tiny_lm(vocab_size=330)
        other.tokenizer = without(other.tokenizer)
        other.tokenizer.add_tokens(["the old"])
        with pytest.raises(DataError, match="splits the text differently"):
            measure(other, TEXT, reference)
        with pytest.raises(DataError, match="330 logits a token and the model 320"):
            measure(tiny_lm(), TEXT, reference)


def test_recorded_logits_stay_within_their_share_of_the_disk() -> None:
    lm = tiny_lm()
    lm.context = 24
    with Reference.of(lm, TEXT, disk=320 * 4 * 50) as reference:
        assert 23 < reference.quality.tokens <= 50
        assert measure(lm, TEXT, reference).tokens == reference.quality.tokens
    with Reference.of(lm, TEXT, disk=1) as reference:
        assert len(reference.windows) == 1


def test_logits_that_are_no_numbers_are_an_error() -> None:
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="task 'words' are not all numbers"):
        Reference.of(lm, TEXT)


def test_an_encoder_decoder_is_measured_on_its_answers() -> None:
    lm, other = tiny_lm("switch_transformers"), tiny_lm("switch_transformers", seed=1)
    with Reference.of(lm, QUESTIONS) as reference:
        found = measure(other, QUESTIONS, reference)
        assert measure(lm, QUESTIONS, reference) == reference.quality
        assert found.kl == found.kl_answer > 0
        assert found.tokens == sum(len(lm.tokenizer(s.answer.strip())["input_ids"]) for s in QUESTIONS.samples)
    with pytest.raises(DataError, match="answers questions: give those"):
        Reference.of(lm, TEXT)


def test_the_guesser_counts() -> None:
    """Witten-Bell on a, b, a over four words, by hand."""
    window = SampleWindow((9, 0, 1, 0), 3.0, 0, 0)
    by_counts = [1 / 4, (1 / 2) / 3, 1 / 4]  # new; new: kinds 1 of 1 + 1, three words left; seen 1 of 2 + 2
    assert guess_nats([window], 4) == pytest.approx(-sum(map(math.log, by_counts)) / 3)


def test_a_model_that_cannot_read_the_samples_is_noticed() -> None:
    lm = tiny_lm()  # random: no text is one that it reads
    with Reference.of(lm, TEXT) as reference:
        assert reference.entropy > 0.9
        check_reads(reference)  # nor could it read any other
        reference.entropy = 0.5  # one that has learnt something
        with pytest.raises(
            DataError, match=r"cannot read the samples of task 'words': its perplexity is \S+, counting the \d+ tokens"
        ):
            check_reads(reference)


def test_mini_reads_english_and_neither_swedish_nor_a_cipher(mini: Callable[[], FakeLM]) -> None:
    text = (
        "The old man sat by the window and looked out at the sea. It was a grey morning, and the boats had not yet "
        "come back to the harbour. He thought of his wife, who had gone to the market an hour before him, and of the "
        "letter which lay unopened upon the table. "
    )
    shifted = "".join(chr(97 + (ord(c) - 84) % 26) if c.islower() else c for c in text)
    lm = mini()
    with Reference.of(lm, Task("english", (Sample(text),), "text")) as reference:
        check_reads(reference)
        assert reference.nats < reference.guess_nats - 1
    swedish = (
        "Det var en gång en gammal man som bodde i ett litet hus vid havet. Varje morgon gick han till stranden för "
        "att se om båtarna hade kommit tillbaka. Han hade en hund som alltid följde med honom, och tillsammans satt de "
        "på en sten och tittade på vågorna. Ibland kom barnen från byn för att höra honom berätta om den tid då han "
        "själv var sjöman. När kvällen kom gick barnen hem, och den gamle mannen tände sin lampa och läste en bok."
    )
    for name, other in (("cipher", shifted), ("swedish", swedish)):
        task = Task(name, (Sample(other),), "text")
        with Reference.of(lm, task) as reference, pytest.raises(DataError, match=f"cannot read .* '{name}'"):
            check_reads(reference)


def test_a_model_that_answers_reads_whatever_the_form() -> None:
    lm = tiny_lm()
    with Reference.of(lm, Task("q", QUESTIONS.samples[:3] * 20, "questions")) as reference:
        assert reference.nats > reference.guess_nats
        reference.entropy = 0.5  # as if it were trained
        reference.quality = Quality(9.0, 1.0, 0, 1, 100, 60, accuracy=0.9, chance=1 / 3)
        check_reads(reference)
        reference.quality = Quality(9.0, 1.0, 0, 1, 100, 60, accuracy=0.4, chance=1 / 3)
        with pytest.raises(DataError):
            check_reads(reference)


@pytest.fixture(scope="module")
def mini() -> Callable[[], FakeLM]:
    """The repository's model in stock transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = FakeLM(model.eval(), AutoTokenizer.from_pretrained(folder))
    return lambda: lm
