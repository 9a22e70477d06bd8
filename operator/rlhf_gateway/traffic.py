"""`python -m rlhf_gateway.traffic`: bounded, open-loop traffic against a policy, for demos and tests.

Requests arrive at a fixed rate whatever the answers do, because users do not wait for each other; what a request took
is counted from the moment it was due. One JSON line is written per request, and a summary to the terminal at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from rlhf_gateway.openai import answers
from rlhf_gateway.wire import ARM_HEADER, FALLBACK_HEADER, REVISION_HEADER


@dataclass(frozen=True)
class Line:
    """One request as its user saw it. `status` 0: no answer at all; `error` says why then."""

    time: float  # seconds since 1970, when it was due
    conversation: str
    status: int
    arm: str | None
    revision: str | None
    fallback: str | None
    latency_ms: float
    prompt: str
    text: str
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None


@dataclass(frozen=True)
class Plan:
    """What to send. `rate` in requests per second, `duration` in seconds; both bound the run."""

    url: str
    prompts: tuple[str, ...]
    rate: float
    conversations: int
    duration: float
    model: str | None = None  # None: the first one that the server lists
    max_tokens: int = 20
    stream: bool = False
    timeout: float = 30.0
    max_in_flight: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt to send: give a JSONL file with a `prompt` in each line")
        if self.rate <= 0 or self.duration <= 0 or self.conversations < 1:
            raise ValueError("rate, duration and conversations must be positive")


class UnreachableError(Exception):
    """Nothing to send to; the message says what was tried."""


class Traffic:
    """Sends one plan and keeps count."""

    def __init__(self, plan: Plan, out: TextIO) -> None:
        self._plan = plan
        self._out = out
        self._draw = random.Random(plan.seed)
        self._stop = asyncio.Event()
        self.lines: list[Line] = []

    def stop(self) -> None:
        """Send no more; answers in flight are still waited for."""
        self._stop.set()

    async def run(self) -> None:
        """Send until the plan's duration is over or `stop` is called."""
        plan = self._plan
        limit = asyncio.Semaphore(plan.max_in_flight)
        tasks: set[asyncio.Task[None]] = set()
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=plan.timeout)
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            model = plan.model or await _first_model(session, plan.url)
            started = loop.time()
            for number in range(max(1, int(plan.rate * plan.duration))):
                due = started + number / plan.rate
                if await self._stopped_before(due - loop.time()):
                    break
                await limit.acquire()
                task = asyncio.create_task(self._ask(session, model, due))
                task.add_done_callback(lambda _task: limit.release())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _stopped_before(self, seconds: float) -> bool:
        if seconds <= 0:
            return self._stop.is_set()
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _ask(self, session: aiohttp.ClientSession, model: str, due: float) -> None:
        plan, loop = self._plan, asyncio.get_running_loop()
        prompt = self._draw.choice(plan.prompts)
        conversation = f"talk-{plan.seed}-{self._draw.randrange(plan.conversations)}"
        moment = time.time() - (loop.time() - due)
        body = {"model": model, "prompt": prompt, "max_tokens": plan.max_tokens, "stream": plan.stream}
        status, headers, text, error = 0, {}, "", None
        try:
            async with session.post(
                plan.url.rstrip("/") + "/v1/completions", json=body, headers={"X-Conversation-Id": conversation}
            ) as response:
                status, headers = response.status, dict(response.headers)
                text, error = _read(response.headers.get("Content-Type", ""), await response.read(), status)
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            status, error = 0, repr(failure)
        latency_ms = round((loop.time() - due) * 1000, 2)
        named = (headers.get(ARM_HEADER), headers.get(REVISION_HEADER), headers.get(FALLBACK_HEADER))
        line = Line(round(moment, 6), conversation, status, *named, latency_ms, prompt, text, error)
        self.lines.append(line)
        self._out.write(json.dumps(asdict(line)) + "\n")


async def _first_model(session: aiohttp.ClientSession, url: str, seconds: float = 30.0) -> str:
    """The name to ask for, by the server's own list. Raises UnreachableError when there is none in time."""
    reason = "no time"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    async with session.get(url.rstrip("/") + "/v1/models") as response:
                        listed = (await response.json(content_type=None)).get("data") or [{}]
                        if name := listed[0].get("id"):
                            return str(name)
                        reason = f"HTTP {response.status} and no model"
                except (aiohttp.ClientError, OSError, ValueError, AttributeError) as error:
                    reason = repr(error)
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise UnreachableError(
            f"{url}/v1/models lists no model within {seconds:g} s ({reason}): is it ready?"
        ) from None


def _read(content_type: str, body: bytes, status: int) -> tuple[str, str | None]:
    if status != 200:
        return "", body[:300].decode("utf-8", "replace")
    streamed = content_type.startswith("text/event-stream")
    if streamed and not body.rstrip().endswith(b"data: [DONE]"):
        return "".join(answers(content_type, body)), "the stream broke off"
    return "".join(answers(content_type, body)), None


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Totals over a run, by arm and revision."""
    latencies = sorted(line.latency_ms for line in lines if line.ok)
    arms = Counter(f"{line.arm or 'none'}/{line.revision or 'none'}" for line in lines)
    return {
        "requests": len(lines),
        "failed": sum(not line.ok for line in lines),
        "conversations": len({line.conversation for line in lines}),
        "arms": dict(sorted(arms.items())),
        "fallbacks": dict(Counter(line.fallback for line in lines if line.fallback)),
        "latency_ms": {f"p{q}": _quantile(latencies, q / 100) for q in (50, 95, 99)},
    }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def read_prompts(path: Path) -> tuple[str, ...]:
    """The `prompt` of every line of a JSONL file. Raises ValueError with file and line."""
    prompts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: each line must be an object with a `prompt` ({error!r})") from error
    return tuple(prompts)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlhf_gateway.traffic", description=__doc__)
    parser.add_argument("--url", required=True, help="http://host:port of the gateway or of a policy server")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with a `prompt` in each line")
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--conversations", type=int, required=True, help="how many conversations they belong to")
    parser.add_argument("--duration", type=float, required=True, help="seconds")
    parser.add_argument("--out", type=Path, required=True, help="JSONL, one line per request")
    parser.add_argument("--model", help="the served name to ask for (default: the first one listed)")
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds a user waits")
    parser.add_argument("--seed", type=int, default=0, help="draws prompts and conversations")
    return parser


async def run(plan: Plan, out: Path) -> dict[str, Any]:
    """Send a plan, write its lines as they come, and return the summary."""
    with out.open("w", encoding="utf-8", buffering=1) as file:
        traffic = Traffic(plan, file)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, traffic.stop)
        await traffic.run()
    return summary(traffic.lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 sent (the summary says how it went), 1 nothing answers, 2 wrong arguments."""
    options = vars(arguments().parse_args(argv))
    out = options.pop("out")
    try:
        plan = Plan(**(options | {"prompts": read_prompts(options["prompts"])}))
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"traffic: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(asyncio.run(run(plan, out))))
    except UnreachableError as error:
        print(f"traffic: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
