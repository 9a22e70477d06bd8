"""``python -m rlhf_trainer.collect --policy DIR --reward-model DIR --prompts FILE --pairs N --out FILE``
``python -m rlhf_trainer.collect --policy DIR --against DIR --prompts FILE --pairs N --out FILE``

Writes pairs for people to compare, one JSON object a line, without a preference: an annotation tool adds it. With a
reward model: two replies of the policy, most where its members disagree; what comes back is appended to the preferences
of the next RewardModelJob (``python -m rlhf_trainer data validate`` first). Against another policy: a reply of each, in
an order drawn by lot; ``python -m rlhf_trainer data report`` then says which of them people prefer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rlhf_trainer.collect.candidates import Candidate, disagreement, pair_up, replies, sample_pairs
from rlhf_trainer.collect.choose import Chosen, choose
from rlhf_trainer.data.rows import load_prompts
from rlhf_trainer.digests import folder_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate.base import SamplingParams
from rlhf_trainer.models.policy import load_policy
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.randomness import Stream, generator
from rlhf_trainer.wire import ExitCode, digest_of


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        rows = collect(arguments)
    except (Invalid, ValueError) as error:
        print(error, file=sys.stderr)
        return int(ExitCode.INVALID)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs to compare are in {arguments.out}", file=sys.stderr)
    return 0


def collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Raises Invalid or ValueError with what is wrong and the remedy."""
    prompts = load_prompts(arguments.prompts)
    params = SamplingParams(arguments.max_new_tokens, arguments.temperature)
    lm, encoder = load_policy(arguments.policy)
    policy = folder_digest(arguments.policy)
    if arguments.against is not None:
        sides = [replies(lm, encoder, prompts, params, arguments.seed, 0)]
        lm, encoder = load_policy(arguments.against)
        sides.append(replies(lm, encoder, prompts, params, arguments.seed, 1))
        found = pair_up(prompts, *sides)
        print(f"{len(prompts) - len(found)} of {len(prompts)} prompts have equal or empty replies", file=sys.stderr)
        drawn = choose([0.0] * len(found), arguments.pairs, 1.0, arguments.seed)
        models = (policy, folder_digest(arguments.against))
        swapped = generator(arguments.seed, Stream.COLLECTION, 2).integers(2, size=len(drawn))
        return [row_of(found[one.index], one, models, bool(swap)) for one, swap in zip(drawn, swapped, strict=True)]
    found = sample_pairs(lm, encoder, prompts, params, arguments.seed)
    disagreements = disagreement(load_reward_model(arguments.reward_model), found)
    chosen = choose(disagreements, arguments.pairs, arguments.uniform_share, arguments.seed)
    return [row_of(found[one.index], one, (policy, policy)) for one in chosen]


def row_of(candidate: Candidate, chosen: Chosen, models: tuple[str, str], swapped: bool = False) -> dict[str, Any]:
    texts = [candidate.prompt, *sorted((candidate.response_a, candidate.response_b))]
    first, second = ((candidate.response_a, models[0]), (candidate.response_b, models[1]))[:: -1 if swapped else 1]
    return {
        "pair_id": digest_of(texts),
        "prompt": candidate.prompt,
        "response_a": first[0],
        "response_b": second[0],
        "model_a": first[1],
        "model_b": second[1],
        "sample_reason": chosen.reason.value,
        "sampling_probability": chosen.probability,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_trainer.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of the policy that answers")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--reward-model", type=Path, help="artifact whose members may disagree")
    other.add_argument("--against", type=Path, help="folder of the policy it is compared with")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--pairs", type=int, required=True, help="pairs to be compared")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--uniform-share", type=float, default=0.25, help="share drawn by lot (default 0.25)")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
