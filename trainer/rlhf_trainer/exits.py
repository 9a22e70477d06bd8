"""How a training process may end, as exceptions, and what each ending means on the wire.

A loop raises one of these; the worker turns it into a Result; the launcher turns Results into the pod's exit code.
"""

from __future__ import annotations

from rlhf_trainer.wire import ExitCode, FailureClass

EXIT_CODES: dict[FailureClass, ExitCode] = {
    FailureClass.SUCCESS: ExitCode.SUCCESS,
    FailureClass.GATE_FAILED: ExitCode.GATE_FAILED,
    FailureClass.INVALID: ExitCode.INVALID,
    FailureClass.DIVERGED: ExitCode.DIVERGED,
    FailureClass.GUARDRAIL_STOPPED: ExitCode.GUARDRAIL_STOPPED,
    FailureClass.GUARDRAIL_PAUSED: ExitCode.GUARDRAIL_PAUSED,
    FailureClass.PREEMPTED: ExitCode.PREEMPTED,
    FailureClass.RENDEZVOUS: ExitCode.RENDEZVOUS,
    FailureClass.NO_PROGRESS: ExitCode.NO_PROGRESS,
    # The kubelet and the cgroup say these; the process itself only exits non-zero.
    FailureClass.OUT_OF_MEMORY: ExitCode.UNKNOWN,
    FailureClass.INFRASTRUCTURE: ExitCode.UNKNOWN,
    FailureClass.UNKNOWN: ExitCode.UNKNOWN,
}


class Ended(Exception):
    """Base of every planned ending. The message says what is wrong, where, and what to do."""

    failure_class = FailureClass.UNKNOWN
    reason = "NonRetriableExitCode"

    def __init__(self, message: str, reason: str | None = None) -> None:
        # Data and paths that are quoted may hold half of a surrogate pair, with which no Result can be written.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.message)
        if reason is not None:
            self.reason = reason


class Invalid(Ended):
    """Configuration or data that no retry can mend."""

    failure_class = FailureClass.INVALID
    reason = "InvalidData"


class Diverged(Ended):
    """A loss, gradient or reward is no longer finite."""

    failure_class = FailureClass.DIVERGED
    reason = "Diverged"


class GuardrailStopped(Ended):
    failure_class = FailureClass.GUARDRAIL_STOPPED
    reason = "GuardrailBreached"


class GuardrailPaused(Ended):
    failure_class = FailureClass.GUARDRAIL_PAUSED
    reason = "GuardrailBreached"


class Preempted(Ended):
    """SIGTERM was received and the work so far is saved."""

    failure_class = FailureClass.PREEMPTED
    reason = "PreemptedByScheduler"


class GateRefused(Ended):
    """A gate that comes before the work refuses it; the reason names the gate, the message every verdict."""

    failure_class = FailureClass.GATE_FAILED
    reason = "GateRefused"


class RendezvousFailed(Ended):
    """The ranks did not meet, or a collective timed out or lost its peer."""

    failure_class = FailureClass.RENDEZVOUS
    reason = "RendezvousMismatch"


class NoProgress(Ended):
    failure_class = FailureClass.NO_PROGRESS
    reason = "NoProgress"


class OutOfMemory(Ended):
    failure_class = FailureClass.OUT_OF_MEMORY
    reason = "OutOfMemory"


class StoreUnavailable(Ended):
    """The object store gave no answer for a while, or changed what it holds: another attempt may do better."""

    reason = "ObjectStoreUnavailable"


class NoSpace(Ended):
    """The disk is full. Another attempt may get another node."""

    reason = "NoSpace"


def classify(error: BaseException) -> Ended:
    """The ending an arbitrary exception amounts to; a planned ending is returned as it is."""
    if isinstance(error, Ended):
        return error
    text = f"{type(error).__name__}: {error}"
    if _is_memory(error):
        return OutOfMemory(
            f"{text}; lower training.microBatchSize, raise training.deepspeed.zeroStage or give the pods more memory"
        )
    if _is_collective(error):
        return RendezvousFailed(f"a collective failed, so a peer died or is cut off: {text}")
    return Ended(text)


def _is_memory(error: BaseException) -> bool:
    """Torch has a class for it on a GPU alone; its CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _is_collective(error: BaseException) -> bool:
    """torch has one class for distributed errors, but gloo still raises plain RuntimeErrors naming its source files."""
    if any(cls.__name__ in {"DistError", "DistBackendError", "DistNetworkError"} for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo/", "[Gloo]", "NCCL", "c10d"))
