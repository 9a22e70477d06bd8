"""The split: uniform, symmetric, monotone in the weight, and the same in every replica."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_gateway.assignment import arm_of, conversation_of, position
from rlhf_gateway.openai import answers
from rlhf_gateway.wire import ConversationKey

KEYS = st.text(max_size=40)
WEIGHTS = st.floats(0.0, 100.0)


@given(salt=KEYS, key=KEYS)
def test_position_is_in_the_half_open_unit_interval(salt: str, key: str) -> None:
    assert 0.0 <= position(salt, key) < 1.0


@given(salt=KEYS, key=KEYS, low=WEIGHTS, high=WEIGHTS)
def test_growing_the_weight_only_adds_to_the_canary(salt: str, key: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    if arm_of(salt, key, low) == "canary":
        assert arm_of(salt, key, high) == "canary"


@given(salt=KEYS, key=KEYS)
def test_the_ends_are_exact(salt: str, key: str) -> None:
    assert arm_of(salt, key, 0.0) == "stable"
    assert arm_of(salt, key, 100.0) == "canary"


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0, 50.0, 99.0])
def test_the_share_is_the_weight_even_below_one_percent(weight: float) -> None:
    n = 100_000
    share = sum(arm_of("salt", f"conversation-{i}", weight) == "canary" for i in range(n)) / n
    deviation = math.sqrt(weight / 100 * (1 - weight / 100) / n)
    assert abs(share - weight / 100) < 4.5 * deviation


def test_positions_are_uniform() -> None:
    n, bins = 50_000, 50
    counts = [0] * bins
    for i in range(n):
        counts[int(position("salt", str(i)) * bins)] += 1
    chi_square = sum((count - n / bins) ** 2 / (n / bins) for count in counts)
    assert chi_square < 98  # 49 degrees of freedom: p < 0.00005 above


def test_another_salt_draws_anew() -> None:
    n = 20_000
    both = sum(arm_of("a", str(i), 10) == arm_of("b", str(i), 10) == "canary" for i in range(n)) / n
    assert abs(both - 0.01) < 4.5 * math.sqrt(0.01 * 0.99 / n)


def test_salt_and_key_do_not_run_together() -> None:
    assert position("ab", "c") != position("a", "bc")


def test_another_process_agrees() -> None:
    program = "from rlhf_gateway.assignment import position; print(repr(position('uid+digest', 'user:ada')))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(other.stdout) == position("uid+digest", "user:ada")


def test_a_conversation_is_named_by_header_then_user_then_nothing() -> None:
    body = json.dumps({"user": "ada", "prompt": "x"}).encode()
    key = ConversationKey()
    assert conversation_of({"X-Conversation-Id": "c1"}, body, key) == ("header:c1", "header")
    assert conversation_of({}, body, key) == ("user:ada", "user")
    lone = conversation_of({}, b'{"prompt": "x"}', key)
    assert lone.unit == "request"
    assert lone.key != conversation_of({}, b'{"prompt": "x"}', key).key


def test_user_is_ignored_when_not_asked_for() -> None:
    key = ConversationKey(otherwise="request")
    assert conversation_of({}, b'{"user": "ada"}', key).unit == "request"


def test_header_and_user_of_the_same_name_are_two_conversations() -> None:
    key = ConversationKey()
    named = conversation_of({"X-Conversation-Id": "ada"}, b"{}", key)
    assert named.key != conversation_of({}, b'{"user": "ada"}', key).key


DEEP = b'{"user": ' + b"[" * 100_000  # within the 8 MiB of a request; Python's parser gives up on it in its own way


@pytest.mark.parametrize("body", [b'{"user": 7}', b'{"user": ', b'["user"]', b'{"user": "  "}', b'\xff"user"', DEEP])
def test_a_body_that_names_nobody_is_a_lone_request(body: bytes) -> None:
    assert conversation_of({}, body, ConversationKey()).unit == "request"


@pytest.mark.parametrize("answer", [("application/json", DEEP), ("text/event-stream", b"data: " + DEEP)])
def test_an_answer_too_deep_to_parse_says_nothing(answer: tuple[str, bytes]) -> None:
    assert answers(*answer) == ()
