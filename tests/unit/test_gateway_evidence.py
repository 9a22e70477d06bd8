"""Counting: never twice, never more than memory allows, and equal to a plain recount."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from rlhf_gateway.assignment import Conversation
from rlhf_gateway.evidence import LATENCY_BOUNDS_MS, Ledger, Outcome, RowKey, Scope
from rlhf_gateway.wire import ArmCounts

STABLE = RowKey(1, "stable", "rev-a", False)
CANARY = RowKey(1, "canary", "rev-b", False)
SCOPE = Scope("salt", 1)


def talk(name: str) -> Conversation:
    return Conversation(f"header:{name}", "header")


def only(ledger: Ledger, key: RowKey = CANARY) -> ArmCounts:
    (row,) = [
        r
        for r in ledger.snapshot(1).counts
        if (r.arm, r.revision, r.stage, r.shadow) == (key.arm, key.revision, key.stage, key.shadow)
    ]
    return row


OUTCOMES = st.builds(
    Outcome,
    failed=st.booleans(),
    violating=st.sampled_from([None, True, False]),
    latency_ms=st.one_of(st.none(), st.floats(0, 1e6)),
)
EVENTS = st.lists(st.tuples(st.sampled_from([STABLE, CANARY]), st.sampled_from("abcdef"), OUTCOMES), max_size=60)


@given(events=EVENTS)
def test_conversations_count_once_and_requests_always(events: list[tuple[RowKey, str, Outcome]]) -> None:
    ledger = Ledger("pod", "epoch")
    plain: dict[RowKey, dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for key, name, outcome in events:
        ledger.record(SCOPE, key, talk(name), outcome)
        plain[key][name].append(outcome)
    assert {(row.arm) for row in ledger.snapshot(1).counts} == {key.arm for key in plain}
    for key, talks in plain.items():
        row = only(ledger, key)
        flat = [outcome for outcomes in talks.values() for outcome in outcomes]
        assert row.requests == len(flat)
        assert row.failures == sum(o.failed for o in flat)
        assert row.violations == sum(o.violating is True for o in flat)
        assert row.conversations == len(talks)
        assert row.failed_conversations == sum(any(o.failed for o in os) for os in talks.values())
        assert row.judged_conversations == sum(any(o.violating is not None for o in os) for os in talks.values())
        assert row.violating_conversations == sum(any(o.violating for o in os) for os in talks.values())
        assert sum(row.latency_buckets) == sum(o.latency_ms is not None for o in flat)
        timed = sum(any(o.latency_ms is not None for o in os) for os in talks.values())
        assert sum(row.latency_conversation_buckets) == timed


@given(events=EVENTS, size=st.integers(1, 6))
def test_a_small_memory_only_leaves_out(events: list[tuple[RowKey, str, Outcome]], size: int) -> None:
    small, large = Ledger("pod", "epoch", max_conversations=size), Ledger("pod", "epoch")
    for key, name, outcome in events:
        small.record(SCOPE, key, talk(name), outcome)
        large.record(SCOPE, key, talk(name), outcome)
    assert small.remembered <= size
    for mine, whole in zip(small.snapshot(1).counts, large.snapshot(1).counts, strict=True):
        assert mine.requests == whole.requests
        assert mine.conversations <= whole.conversations
        assert mine.violating_conversations <= whole.violating_conversations
    left_out = sum(w.conversations for w in large.snapshot(1).counts) - sum(
        m.conversations for m in small.snapshot(1).counts
    )
    assert small.uncounted_conversations > 0 or left_out == 0


def test_a_stage_longer_than_the_memory_goes_on_being_counted_and_in_both_arms_alike() -> None:
    """At 5 % of 1,000 remembered ones the candidate would stop at 50: no stage that asks for 100 would ever end."""
    ledger = Ledger("pod", "epoch", max_conversations=1000)
    for number in range(40_000):
        arm = CANARY if number % 20 == 0 else STABLE
        ledger.record(SCOPE, arm, talk(str(number)), Outcome(failed=number % 10 == 0))
    candidate, stable = only(ledger), only(ledger, STABLE)
    assert candidate.conversations > 120
    assert 0.04 < candidate.conversations / (candidate.conversations + stable.conversations) < 0.06
    assert ledger.remembered <= 1000
    counted = candidate.conversations + stable.conversations
    assert ledger.uncounted_conversations == 40_000 - counted
    for number in range(40_000):  # everybody comes back, and nobody is counted again
        ledger.record(SCOPE, CANARY if number % 20 == 0 else STABLE, talk(str(number)), Outcome())
    assert only(ledger).conversations + only(ledger, STABLE).conversations == counted


def test_lone_requests_are_all_counted_and_take_no_memory() -> None:
    ledger = Ledger("pod", "epoch", max_conversations=10)
    for number in range(100):
        ledger.record(SCOPE, CANARY, Conversation(f"request:{number}", "request"), Outcome(violating=number == 99))
    assert (only(ledger).conversations, only(ledger).violating_conversations) == (100, 1)
    assert (ledger.remembered, ledger.uncounted_conversations) == (0, 0)


def test_a_newer_stage_takes_the_memory_of_an_older_one_which_is_then_never_recounted() -> None:
    ledger = Ledger("pod", "epoch", max_conversations=2)
    ledger.record(SCOPE, CANARY, talk("a"), Outcome())
    ledger.record(SCOPE, CANARY, talk("b"), Outcome())
    later = RowKey(2, "canary", "rev-b", False)
    ledger.record(Scope("salt", 2), later, talk("a"), Outcome())
    assert only(ledger, later).conversations == 1
    ledger.record(SCOPE, CANARY, talk("a"), Outcome(failed=True))
    row = only(ledger)
    assert (row.requests, row.failures) == (3, 1)
    assert (row.conversations, row.failed_conversations) == (2, 0)
    assert ledger.uncounted_conversations == 1


def test_rows_of_stages_long_past_are_given_up() -> None:
    ledger = Ledger("pod", "epoch", max_rows=3)
    for stage in range(10):
        ledger.record(Scope("salt", stage), RowKey(stage, "canary", "rev-b", False), talk("a"), Outcome())
    assert [row.stage for row in ledger.snapshot(1).counts] == [7, 8, 9]


def test_a_new_candidate_counts_the_same_people_anew() -> None:
    ledger = Ledger("pod", "epoch")
    ledger.record(Scope("one", 1), STABLE, talk("a"), Outcome())
    ledger.record(Scope("two", 1), STABLE, talk("a"), Outcome())
    assert only(ledger, STABLE).conversations == 2


def test_latency_falls_into_the_bucket_whose_bound_it_does_not_exceed() -> None:
    ledger = Ledger("pod", "epoch")
    for latency in (500.0, 500.1, 1e9):
        ledger.record(SCOPE, CANARY, talk("a"), Outcome(latency_ms=latency))
    buckets = only(ledger).latency_buckets
    assert len(buckets) == len(LATENCY_BOUNDS_MS) + 1
    at = LATENCY_BOUNDS_MS.index(500.0)
    assert (buckets[at], buckets[at + 1], buckets[-1]) == (1, 1, 1)
    assert sum(only(ledger).latency_conversation_buckets) == 1


def test_diverted_requests_are_no_samples() -> None:
    ledger = Ledger("pod", "epoch")
    ledger.divert(CANARY)
    assert (only(ledger).diverted, only(ledger).requests, only(ledger).conversations) == (1, 0, 0)


def test_evidence_survives_the_wire() -> None:
    ledger = Ledger("pod", "epoch")
    ledger.record(SCOPE, CANARY, talk("a"), Outcome(violating=True, latency_ms=3))
    evidence = ledger.snapshot(7)
    assert type(evidence).model_validate_json(evidence.to_json()) == evidence
    assert evidence.units == {"header": 1}
