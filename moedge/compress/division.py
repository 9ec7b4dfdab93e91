"""Which samples are profiled and which are tested on, as a model reads them.

Knows samples, tokenizers and the context; what is done with them is elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moedge.compress.opening import PASS
from moedge.compress.profile import Question
from moedge.compress.samples import Scope, Task, Windows, read_task, windows
from moedge.errors import DataError
from moedge.runtime.lm import LM


def tests_of(fitted: Task, test: Task, specs: Sequence[str]) -> tuple[list[Task], list[str]]:
    """The test part of a task and other tasks ([NAME=]FILE) to test on, each by a name of its own; and warnings.

    Samples that are profiled, `fitted`, are taken out of the others. Raises DataError where none is left of one.
    """
    profiled = {sample.key for sample in fitted.samples}
    found, warnings = [test], list[str]()
    for spec in specs:
        task = read_task(spec)
        samples = tuple(sample for sample in task.samples if sample.key not in profiled)
        if not samples:
            raise DataError(f"all samples of {spec} may be profiled for {fitted.name!r}: give others to test on")
        if len(samples) < len(task):
            left = len(task) - len(samples)
            warnings.append(f"{left} of the {len(task)} samples of {spec} may be profiled, and are not tested on")
        found.append(replace(task, samples=samples, name=_free_name(task.name, [each.name for each in found])))
    return found, warnings


def _free_name(name: str, taken: Sequence[str]) -> str:
    names = (name, *(f"{name} {number}" for number in range(2, len(taken) + 2)))
    return next(each for each in names if each not in taken)


def up_to(task: Task, tokenizer: Any, tokens: int) -> Task:
    """The first samples with about `tokens` tokens together, at least one."""
    total = 0
    for count, sample in enumerate(task.samples, start=1):
        total += len(tokenizer(sample.text, add_special_tokens=False, verbose=False)["input_ids"])
        if total >= tokens:
            return task.take(0, count)
    return task


def as_read(lm: LM, task: Task, scope: Scope) -> Windows | list[Question]:
    """The samples of a task as the profile reads them: in windows of at most PASS tokens.

    Raises DataError as `windows` does, and of an encoder-decoder for a text or a question that is too long.
    """
    size = min(PASS, lm.context or PASS)
    if not lm.anatomy.encoder_decoder:
        return windows(task, lm.tokenizer, size, scope)
    return [_question(task, number, lm.tokenizer, size) for number in range(len(task))]


def _question(task: Task, number: int, tokenizer: Any, size: int) -> Question:
    """Ids as an answer is measured: what ends a prompt goes along, what ends an answer does not."""
    sample = task.samples[number]
    if sample.answer is None:
        raise DataError(f"task {task.name!r} is a text, but an encoder-decoder answers questions: give those")
    prompt = tokenizer(sample.prompt, verbose=False)["input_ids"]
    answer = tokenizer(sample.answer.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    if max(len(prompt), len(answer)) > size:
        raise DataError(
            f"task {task.name!r} has a sample of {len(prompt)} tokens and {len(answer)} of its answer, up to {size} of "
            f"each are read, {sample.prompt[:40]!r}: shorten it, or leave it out"
        )
    return Question(tuple(prompt), tuple(answer))


def cut_warning(name: str, cut: int) -> list[str]:
    """What is to be said of questions of `name` that were longer than the context."""
    if not cut:
        return []
    many = f"{cut} questions are" if cut > 1 else "1 question is"
    return [f"{name}: {many} longer than the {PASS} tokens that are read, of which the last were taken"]
