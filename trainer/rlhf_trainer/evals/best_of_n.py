"""Best of n by the reward model, judged by an audit model: what optimisation would do, before it is paid for.

Choosing the best of n is the simplest optimisation there is (KL from the base ln n - (n-1)/n). If the audit does not
like the favourites better than the rest, no policy trained on this reward will be better either.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlhf_trainer.config import BestOfNPreflight
from rlhf_trainer.evals.stats import Interval, ratio_of_means, student_mean
from rlhf_trainer.evals.verdicts import at_least, unknown
from rlhf_trainer.wire import Verdict

Floats = npt.NDArray[np.float64]

LIFT, RATIO = "bestOfNLift", "bestOfNLiftRatio"


def lifts(scores: Floats, favourites: npt.NDArray[np.intp]) -> Floats:
    """z-score of each prompt's favourite [P] among the base's replies: (its score - the prompt's mean) over the
    standard deviation of all ``scores`` [P, n]. Zeros when they are all alike."""
    spread = float(scores.std())
    chosen = scores[np.arange(len(scores)), favourites]
    lifted: Floats = (chosen - scores.mean(axis=1)) / (spread or 1.0)
    return lifted


def judge(proxy: Floats, audit: Floats, wanted: BestOfNPreflight) -> tuple[Verdict, ...]:
    """Verdicts on replies [P, n] scored by both models: does the audit gain, and enough of what the proxy gains?"""
    if float(proxy.std()) == 0.0 or float(audit.std()) == 0.0:
        which = "the reward model" if float(proxy.std()) == 0.0 else "the audit reward model"
        return (unknown(LIFT, wanted.min_lift, f"{which} gives every reply of the base the same score"),)
    favourites = proxy.argmax(axis=1)
    by_proxy, by_audit = lifts(proxy, favourites), lifts(audit, favourites)
    gained: Interval = student_mean(by_audit)
    kept = ratio_of_means(by_audit, by_proxy)
    best = f"best of {proxy.shape[1]} by the reward model, per prompt"
    return (
        at_least(LIFT, gained, wanted.min_lift, f"{best}: the audit's z-score of the favourites"),
        at_least(RATIO, kept, wanted.min_lift_ratio, f"{best}: lift by the audit over lift by the reward model"),
    )
