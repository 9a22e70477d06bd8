"""Text from tokens: pieces add up to the whole, stop strings never show."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from rlhf_trainer.serve.text import StopText, TextStream


def words(tokens: Sequence[int]) -> str:
    """A word tokenizer: spaces between, none in front."""
    return " ".join(f"w{token}" for token in tokens)


def byte_level(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


@given(tokens=st.lists(st.integers(0, 99), max_size=30))
def test_pieces_of_words_add_up(tokens: list[int]) -> None:
    stream = TextStream(words)
    assert "".join([*(stream.push(token) for token in tokens), stream.flush()]) == words(tokens)


@given(text=st.text(max_size=20))
def test_a_character_of_several_tokens_comes_out_whole(text: str) -> None:
    stream = TextStream(byte_level)
    pieces = [stream.push(token) for token in text.encode("utf-8", "replace")]
    assert "".join([*pieces, stream.flush()]) == text.encode("utf-8", "replace").decode()
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_never_became_a_character_is_given_out_at_the_end() -> None:
    stream = TextStream(byte_level)
    assert stream.push(0xC3) == ""
    assert stream.flush() == "\ufffd"


ALPHABET = st.text("abc", max_size=12)


@given(pieces=st.lists(ALPHABET, max_size=8), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    at = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    checker = StopText(stops)
    given_out = "".join(checker.push(piece) for piece in pieces)
    stopped = checker.stopped
    given_out += checker.flush()
    if at is None:
        assert (given_out, stopped) == (whole, False)
    else:
        assert stopped
        assert whole.startswith(given_out)
        assert all(stop not in given_out for stop in stops)


def test_a_beginning_of_a_stop_string_waits() -> None:
    checker = StopText(["END"])
    assert checker.push("the E") == "the "
    assert checker.push("N") == ""
    assert checker.push("x") == "ENx"
    assert checker.push("EN") == ""
    assert checker.push("D more") == ""
    assert checker.stopped
