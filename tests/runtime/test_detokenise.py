"""Streaming text: the pieces joined are what decoding at once gives, and nothing of a stop string comes out."""

from typing import Any

import pytest
from fake_lm import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moedge.runtime.detokenise import Detokeniser, StopStrings


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece's: words begin with a space that decoding the first one drops; bytes for what is unknown."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁sea": 2, "s": 3, "▁": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    plain = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def streamed(words: Any, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = Detokeniser(words, prompt or [])
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize(
    "text", ["The sea was calm.", "Größe 中文 🌍🌍 naïve", "  two  spaces\n\n\tand tabs ", "", " "]
)
def test_pieces_joined_are_the_text(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert "".join(streamed(tokenizer(), ids)) == text


def test_no_piece_has_half_a_character() -> None:
    pieces = streamed(tokenizer(), tokenizer()("a 語🌍ü b")["input_ids"])
    assert "".join(pieces) == "a 語🌍ü b"
    assert not any("�" in piece for piece in pieces)


@given(st.lists(st.integers(3, 300), max_size=30), st.lists(st.integers(3, 300), max_size=8))
@settings(max_examples=150, deadline=None)
def test_any_ids_at_all_decode_as_at_once(ids: list[int], prompt: list[int]) -> None:
    words = tokenizer()
    before = words.decode(prompt[-6:], skip_special_tokens=True)
    if before.endswith("�"):
        return  # a prompt that ends inside a character
    together = words.decode(prompt[-6:] + ids, skip_special_tokens=True)
    assert before + "".join(streamed(words, ids, prompt)) == together


def test_the_first_space_after_a_prompt_is_kept() -> None:
    words = metaspace()
    assert "".join(streamed(words, [2, 3, 1], prompt=[1])) == " seas the"
    assert "".join(streamed(words, [2, 3, 1])) == "seas the"


def test_characters_of_several_byte_tokens_come_whole() -> None:
    words = metaspace()
    ids = [5 + byte for byte in "中".encode()]
    assert streamed(words, [*ids, 2], prompt=[1]) == ["", "", "中", " sea", ""]


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    assert streamed(metaspace(), [5 + 0xE4], prompt=[1]) == ["", "�"]


def test_special_tokens_have_no_text() -> None:
    assert "".join(streamed(tokenizer(), [0, 3, *tokenizer()("sea")["input_ids"], 4])) == "sea"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert streamed(None, [1, 2]) == ["", "", ""]


def run_stops(stop: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stops, shown = StopStrings(stop), []
    for at, piece in enumerate(pieces):
        text, stopped = stops.push(piece, last=at == len(pieces) - 1)
        shown.append(text)
        if stopped:
            return shown, True
    return shown, False


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "stopped"),
    [
        ([], ["a", "b"], ["a", "b"], False),
        (["END"], ["so E", "N", "D more"], ["so ", "", ""], True),
        (["END"], ["so E", "N", "T"], ["so ", "", "ENT"], False),
        (["END"], ["so E", "N"], ["so ", "EN"], False),  # nothing follows: it was no stop string
        (["aab"], ["aa", "ab", "x"], ["", "a"], True),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True),
        (["xy", "b"], ["ab", "xy"], ["a"], True),
        (["bc", "b"], ["abc"], ["a"], True),
        (["long stop", "z"], ["a long st", "op z"], ["a ", ""], True),
    ],
)
def test_stop_strings(stop: list[str], pieces: list[str], shown: list[str], stopped: bool) -> None:
    assert run_stops(stop, pieces) == (shown, stopped)


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2))
@settings(max_examples=200, deadline=None)
def test_what_comes_out_is_the_text_up_to_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    shown, stopped = run_stops(stop, pieces)
    out, text = "".join(shown), "".join(pieces)
    assert text.startswith(out)
    assert not any(word in out for word in stop)
    assert stopped == any(word in text for word in stop)
    if not stopped:
        assert out == text
