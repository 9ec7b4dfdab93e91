"""Token ids to text as they come: whole characters only, and nothing of a stop string. Knows no model.

The pieces joined are the text that decoding everything at once gives after the prompt.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_TAIL = 6  # ids of the prompt that are decoded with the answer, so that its first space is kept
_BROKEN = "�"  # what a tokenizer gives for bytes that are no character, or not yet one


class Detokeniser:
    """Decodes a growing sequence. A character whose last bytes are still to come is held back.

    Without a tokenizer every text is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_TAIL:])  # the window that is decoded: settled ids, then new ones
        self._settled = len(self._ids)
        self._before = self._decode(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_BROKEN) or len(text) <= len(self._before):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """What is still held back, complete or not."""
        return self._settle(self._decode(self._ids))

    def _settle(self, text: str) -> str:
        new = text[len(self._before) :]
        del self._ids[: self._settled]
        self._settled = len(self._ids)
        self._before = self._decode(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Passes text on until a stop string appears, which may straddle pieces; nothing of it, or after it, comes out."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string ended it. `last`: nothing follows, hold nothing."""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
