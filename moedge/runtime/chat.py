"""A conversation with a model: the messages so far, and a cache that each turn adds to. Knows no terminal."""

from collections.abc import Generator
from typing import Any

from moedge.runtime.generate import Step, generate
from moedge.runtime.session import Model, Session


class Chat:
    """Turns of user and assistant. A model without a chat template continues each line, and remembers none."""

    def __init__(self, lm: Model, system: str | None = None, max_new_tokens: int = 64, **settings: Any) -> None:
        self._lm = lm
        self._system = system
        self._settings = {"max_new_tokens": max_new_tokens} | settings
        self.remembers = bool(lm.tokenizer.chat_template) and not lm.model.config.is_encoder_decoder
        self._session = Session(lm) if self.remembers else None
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        if self._session is not None:
            self._session.reset()

    def ask(self, text: str) -> Generator[Step, None, None]:
        """Answer `text`. What was answered until the end, or until closed, is remembered; an error forgets it."""
        if not self.remembers:
            yield from generate(self._lm, text, **self._settings)
            return
        question = {"role": "user", "content": text}
        steps = generate(self._lm, [*self.messages, question], session=self._session, **self._settings)
        answer = ""
        try:
            for step in steps:
                answer += step.text
                yield step
        except GeneratorExit:
            self._remember(question, answer)
            raise
        self._remember(question, answer)

    def _remember(self, question: dict[str, str], answer: str) -> None:
        self.messages += [question, {"role": "assistant", "content": answer}]
