"""Makes the tokenizer and the token streams of the mini model: text in, `tokenizer/` and `streams/*.npz` out."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moedge.terminal import console
from moedge.train.data import ExampleStream, Stream, TextStream
from recipes.mini import sources, tasks

VOCABULARY = 4096
END, USER, ASSISTANT, SYSTEM, TURN = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Characters of each domain that the tokenizer sees: novels and biomedicine are judged by their bytes, so they lead.
SAMPLE = {
    "novel": 5_000_000,
    "biomedicine": 4_000_000,
    "encyclopaedia": 700_000,
    "code": 700_000,
    "languages": 500_000,
    "play": 300_000,
    "mathematics": 300_000,
}
REVIEW_SAMPLE = 400_000


def make_tokenizer(data: Path, texts: dict[str, sources.Split]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token, so that arithmetic has columns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT, SYSTEM, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(data, texts), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM, TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _sample(data: Path, texts: dict[str, sources.Split]) -> list[str]:
    found = []
    for domain, budget in SAMPLE.items():
        documents = texts[domain].train
        share = min(1.0, budget / sum(map(len, documents)))
        if len(documents) < 100:
            found += [document[: round(len(document) * share)] for document in documents]
        else:
            found += documents[: round(len(documents) * share)]
    reviews = "\n".join(str(record["sentence"]) for record in sources.jsonl(data / "tasks/sst2/train.jsonl"))
    return [*found, reviews[:REVIEW_SAMPLE]]


def _text_tokens(tokenizer: Any, documents: list[str]) -> np.ndarray[Any, Any]:
    end = [tokenizer.eos_token_id]
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array(ids + end, np.uint16) for ids in encoded])


def _examples(tokenizer: Any, name: str, task: tasks.Task) -> dict[str, np.ndarray[Any, Any]]:
    rng = random.Random(name)
    forms = [tasks.document(name, record, rng) for record in task.records]
    prompts = tokenizer([prompt for prompt, _, _ in forms], add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer for _, answer, _ in forms], add_special_tokens=False)["input_ids"]
    end, user, assistant, turn = tokenizer.convert_tokens_to_ids([END, USER, ASSISTANT, TURN])
    ids: list[int] = []
    weights: list[float] = []
    offsets = [0]
    stop = task.answer_weight if name == "arithmetic" else 1.0  # where a number ends is part of the answer
    for (_, _, chat), prompt, answer in zip(forms, prompts, answers, strict=True):
        before, after = ([user, *prompt, turn, assistant], turn) if chat else (prompt, end)
        ids += [*before, *answer, after]
        last = task.answer_weight if task.last_weight is None else task.last_weight
        weights += [task.prompt_weight] * len(before) + [task.answer_weight] * (len(answer) - 1) + [last, stop]
        offsets.append(len(ids))
    return {
        "ids": np.array(ids, np.uint16),
        "weights": np.array(weights, np.float32),
        "offsets": np.array(offsets, np.int64),
    }


def prepare(data: Path, out: Path) -> None:
    """Writes `out/tokenizer` and `out/streams`; files that are there stay."""
    if (out / "streams/done").exists():
        return
    texts = sources.texts(data)
    (out / "streams").mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(data, texts)
    tokenizer.save_pretrained(out / "tokenizer")
    for name, split in texts.items():
        ids = _text_tokens(tokenizer, split.train)
        np.savez(out / f"streams/text-{name}.npz", ids=ids)
        size = sum(len(document.encode()) for document in split.train)
        console.print(f"{name}: {len(ids):,} tokens, {size / len(ids):.2f} bytes a token")
    for name, task in tasks.training(data, texts).items():
        arrays = _examples(tokenizer, name, task)
        ids, weights, offsets = arrays["ids"], arrays["weights"], arrays["offsets"]
        np.savez(out / f"streams/task-{name}.npz", ids=ids, weights=weights, offsets=offsets)
        console.print(f"{name}: {len(task.records):,} examples, {len(arrays['ids']):,} tokens")
    (out / "streams/done").touch()


def streams(out: Path) -> dict[str, Stream]:
    """The prepared streams by name: domains of text, and tasks."""
    found: dict[str, Stream] = {}
    for path in sorted((out / "streams").glob("*.npz")):
        kind, _, name = path.stem.partition("-")
        with np.load(path) as arrays:
            if kind == "text":
                found[name] = TextStream(arrays["ids"], seed=1)
            else:
                found[name] = ExampleStream(arrays["ids"], arrays["weights"], arrays["offsets"], seed=1)
    return found
