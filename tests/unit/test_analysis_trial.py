"""Folding, the trial's state, its JSON, and verdicts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_operator.analysis import codec, harm
from rlhf_operator.analysis.fold import MAX_PODS, Counts, Reading, RowName, Seen, fold, forget_rows
from rlhf_operator.analysis.trial import Design, Metric, Trial, advanced
from rlhf_operator.analysis.verdict import failed, judge, passed
from rlhf_trainer.wire import VerdictState

ROW = RowName(101, "canary")
NEED, PASS, FAIL, UNKNOWN = (
    VerdictState.NEED_MORE_DATA,
    VerdictState.PASS,
    VerdictState.FAIL,
    VerdictState.UNKNOWN,
)


def counts(n: int, bad: int = 0, failed: int = 0, latency: tuple[int, ...] = ()) -> Counts:
    return Counts(conversations=n, failed=failed, judged=n, violating=bad, latency=latency)


def both(n: int, m: int, bad: int = 0, stable_bad: int = 0, stage: int = 101) -> dict[RowName, Counts]:
    return {RowName(stage, "canary"): counts(n, bad), RowName(stage, "stable"): counts(m, stable_bad)}


def reading(pod: str, epoch: str, n: int) -> Reading:
    return Reading(pod, epoch, {ROW: counts(n)})


# fold

events = st.lists(
    st.tuples(st.sampled_from(["p", "q"]), st.sampled_from(["count", "read", "restart", "late"]), st.integers(1, 9)),
    max_size=40,
)


@given(events)
def test_whatever_happens_each_count_is_folded_at_most_once_and_reported_ones_exactly_once(
    script: list[tuple[str, str, int]],
) -> None:
    """Pods count, restart and are read, also late: an old answer that arrives after a newer one."""
    now = dict.fromkeys("pq", (0, 0))  # epoch, count
    answers: dict[str, list[Reading]] = {"p": [], "q": []}
    reported = dict.fromkeys([(pod, epoch) for pod in "pq" for epoch in range(50)], 0)
    pods: dict[str, Seen] = {}
    total = 0
    for pod, what, number in script:
        epoch, count = now[pod]
        if what == "count":
            now[pod] = (epoch, count + number)
        elif what == "restart":
            now[pod] = (epoch + 1, 0)
        else:
            if what == "read" or not answers[pod]:
                answers[pod].append(reading(pod, f"e{epoch}", count))
            answer = answers[pod][-min(number, len(answers[pod]))] if what == "late" else answers[pod][-1]
            if (seen := pods.get(pod)) is not None and answer.epoch != seen.epoch and answer.epoch not in seen.past:
                later = int(answer.epoch[1:]) > int(seen.epoch[1:])
                answer = answer if later else answers[pod][-1]  # an unseen older process cannot come after a newer one
            pods, new = fold(pods, [answer])
            total += new.get(ROW, Counts()).conversations
            at = (pod, int(answer.epoch[1:]))
            accepted = pods.get(pod) is not None and pods[pod].epoch == answer.epoch
            if accepted:
                reported[at] = max(reported[at], answer.rows[ROW].conversations)
    assert total == sum(reported.values())


def test_a_restarted_process_starts_from_zero_and_the_old_one_is_not_read_again() -> None:
    pods, new = fold({}, [reading("p", "a", 10)])
    pods, _ = fold(pods, [reading("p", "b", 3)])
    assert pods["p"].epoch == "b"
    pods, again = fold(pods, [reading("p", "a", 12)])
    assert (new[ROW].conversations, again) == (10, {})


def test_forgotten_rows_and_pods_keep_the_state_bounded() -> None:
    pods, _ = fold({}, [reading(f"p{n}", "a", 1) for n in range(MAX_PODS + 5)])
    assert list(pods) == [f"p{n}" for n in range(5, MAX_PODS + 5)]
    assert all(not seen.rows for seen in forget_rows(pods, 102).values())
    assert forget_rows(pods, 101) == pods


# trial


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=8))
def test_the_tests_do_not_depend_on_how_often_the_counts_are_pulled(batches: list[tuple[int, int, int]]) -> None:
    """Up to the share, which is bracketed by what was observed before: with the configured split it is the same."""
    design = {101: Design(0.25)}
    piecewise = Trial()
    for n, m, bad in batches:
        piecewise = advanced(piecewise, both(n, m, min(bad, n), min(bad, m)), design)
    total = both(*(sum(values) for values in zip(*((n, m, min(b, n), min(b, m)) for n, m, b in batches), strict=True)))
    at_once = advanced(Trial(), total, design)
    assert piecewise.stages == at_once.stages
    if at_once.comparisons:
        one, other = piecewise.comparisons[Metric.SAFETY], at_once.comparisons[Metric.SAFETY]
        assert (one.upper.units, one.upper.bad) == (other.upper.units, other.upper.bad)


def test_rows_of_another_trial_are_no_evidence() -> None:
    assert advanced(Trial(), both(50, 50, 40, stage=201), {101: Design(0.5)}) == Trial()


def test_an_observed_share_above_the_configured_one_makes_the_abort_test_slower_and_never_faster() -> None:
    honest = advanced(Trial(), both(100, 900, 5, 5), {101: Design(0.1)})
    skewed = advanced(Trial(), both(500, 500, 5, 5), {101: Design(0.1)})
    assert harm.log_e_value(skewed.comparisons[Metric.SAFETY].log_e) < harm.log_e_value(
        honest.comparisons[Metric.SAFETY].log_e
    )


def test_latency_is_judged_against_counts_that_came_before() -> None:
    design = {101: Design(0.5)}
    fast, slow = (95, 5, 0), (40, 60, 0)
    first = {RowName(101, "canary"): counts(100, latency=slow), RowName(101, "stable"): counts(100, latency=fast)}
    trial = advanced(Trial(), first, design)
    assert Metric.LATENCY not in trial.comparisons  # there was no reference yet
    trial = advanced(trial, first, design)
    assert (trial.comparisons[Metric.LATENCY].upper.units, trial.comparisons[Metric.LATENCY].upper.bad) == (100, 60)


trials = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.sampled_from([101, 102])), max_size=6
)


@given(trials)
def test_a_trial_survives_the_status_and_goes_on_as_if_it_had_never_been_written(
    batches: list[tuple[int, int, int, int]],
) -> None:
    designs = {101: Design(0.1), 102: Design(0.5)}
    kept, written = Trial(), Trial()
    for n, m, bad, stage in batches:
        new = both(n, m, min(n, bad), min(m, bad), stage)
        kept = advanced(kept, new, designs)
        written = codec.from_json(json.loads(json.dumps(codec.to_json(advanced(written, new, designs)))))
    for metric in kept.comparisons:
        assert written.comparisons[metric].log_e == pytest.approx(kept.comparisons[metric].log_e, abs=1e-4)
    assert (written.stages, written.exposures) == (kept.stages, kept.exposures)
    assert codec.from_json(codec.to_json(written)) == written


@pytest.mark.parametrize("damage", [None, [], {}, {"pods": 3}, {"pods": {}, "stages": {"x": [1]}}, "text"])
def test_a_damaged_status_is_an_empty_trial_that_folds_everything_again(damage: object) -> None:
    assert codec.from_json(damage) == Trial()


# verdicts


def judged(n: int, m: int, bad: int, stable_bad: int, margin: float = 0.02):  # type: ignore[no-untyped-def]
    design = Design(0.5)
    trial = advanced(Trial(), both(n, m, bad, stable_bad), {101: design})
    judgement = judge(trial, Metric.SAFETY, margin, 0.01, design)
    assert failed(trial, Metric.SAFETY, margin, 0.01) == (judgement.state is FAIL)
    assert passed(trial, Metric.SAFETY, margin, 0.01) == (judgement.state is PASS)
    return judgement


def test_no_data_is_not_a_pass_and_says_what_is_needed() -> None:
    judgement = judge(Trial(), Metric.AVAILABILITY, 0.02, 0.01, Design(0.1))
    assert (judgement.state, judgement.n) == (NEED, 0)
    assert judgement.needed is not None
    assert 230 <= judgement.needed <= 460  # ln(100)/0.02 and the price of not knowing the best stake
    assert f"{judgement.needed} without a bad one" in judgement.message


def test_not_rejecting_is_not_passing() -> None:
    judgement = judged(200, 200, 0, 0)
    assert judgement.state is NEED
    assert judgement.upper > 0.02
    assert judgement.needed > 0


def test_enough_clean_conversations_pass_with_a_bound_below_the_margin() -> None:
    judgement = judged(600, 600, 0, 0)
    assert judgement.state is PASS
    assert judgement.upper <= 0.02
    assert judgement.needed == 0


def test_a_leak_fails_with_its_e_value() -> None:
    judgement = judged(100, 100, 30, 1)
    assert judgement.state is FAIL
    assert judgement.e_value >= judgement.bound
    assert judgement.lower > 0.0
    assert "the candidate is worse" in judgement.message
    assert math.isclose(judgement.estimate, 0.29)


@pytest.mark.parametrize("pulls", [1, 4])
def test_mirrored_questions_left_out_do_not_make_the_candidate_look_better(pulls: int) -> None:
    """Three of four were dropped because too many were in flight: 6 % against 2 % is still 4 % worse."""
    design, trial = Design.of(0.0, shadow=True), Trial()
    for _ in range(pulls):
        trial = advanced(trial, both(400 // pulls, 1600 // pulls, 24 // pulls, 32 // pulls), {101: design})
    judgement = judge(trial, Metric.SAFETY, 0.05, 0.01, design)
    assert judgement.state is NEED
    assert math.isclose(judgement.stable_rate, 0.02)
    assert math.isclose(judgement.estimate, 0.04)


def test_worse_by_less_than_the_margin_passes_although_it_is_worse() -> None:
    judgement = judged(40_000, 40_000, 600, 400)
    assert judgement.e_value > 100
    assert judgement.state is PASS


def test_unjudged_answers_are_unknown_and_not_safe() -> None:
    trial = advanced(
        Trial(),
        {RowName(101, "canary"): Counts(conversations=50), RowName(101, "stable"): Counts(conversations=50)},
        {101: Design(0.5)},
    )
    assert judge(trial, Metric.SAFETY, 0.02, 0.01, Design(0.5)).state is UNKNOWN
    assert judge(trial, Metric.AVAILABILITY, 0.02, 0.01, Design(0.5)).state is NEED
