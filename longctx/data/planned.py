"""The microbatches of a step whose sequence groups a planner chooses anew every step.

The planner runs on one rank, one step ahead, in a thread; its plan is handed to every rank, checked
there, and read ahead by each. Plans travel as JSON between `StepLoader.step` calls of the main thread,
so no collective runs beside the training step's own.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from parallel.errors import PlanError
from parallel.planner.sequence import Group, StepPlan

from ..errors import ConfigError, OutOfData
from .batch import PackedBatch, build_batch
from .held_out import HeldOutBatch, held_out_batches
from .loader import Packs, StepLoader
from .packing import Pack, Piece
from .tokenizers import Tokenizer
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Planning:
    """How this rank gets its plans."""

    data_rank: int
    """This rank among the data ranks."""
    plan: Callable[[list[int]], StepPlan]
    """Plan of a step's pieces, from the tokens that each counts."""
    check: Callable[[StepPlan, list[int]], None]
    """Raises PlanError where a plan breaks a rule."""
    share: Callable[[Any], Any]
    """Hands the leader's JSON value to every rank; all ranks call it together."""
    leader: bool
    """Whether this rank plans."""


class PlannedLoader(StepLoader):
    """`StepLoader` for adaptive groups; `step` is called on all ranks together."""

    def __init__(
        self, store: Tokens, packs: Packs, planning: Planning, *, vocab_size: int | None = None
    ) -> None:
        super().__init__(store, packs, vocab_size=vocab_size)
        self._planning = planning
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longctx-planner")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longctx-reader")
        self._planned: tuple[int, Future[dict[str, Any]]] | None = None
        self._received: tuple[int, StepPlan, Future[list[PackedBatch]]] | tuple[int, ValueError] | None = None
        self.plan: StepPlan | None = None
        """Plan of the last `step`."""

    def step(self, step: int) -> list[PackedBatch]:
        """This rank's microbatches: one of every microbatch of the plan, maybe empty.

        Raises:
            ConfigError: no plan exists, for example for a piece longer than all ranks can hold.
            OutOfData: nothing is left to draw; see `StepLoader.step`.
        """
        started = time.perf_counter()
        if self._received is None or self._received[0] != step:
            self._receive(step)
        received = self._received
        assert received is not None, "a plan was received just now"
        if len(received) == 2:
            raise received[1]
        _, self.plan, future = received
        batches = future.result()
        self._receive(step + 1)
        if self._planning.leader:
            self._planned = (step + 2, self._planner.submit(self._plan, step + 2))
        self.wait_s = time.perf_counter() - started
        return batches

    def batches(self, step: int, plan: StepPlan) -> list[PackedBatch]:
        """This rank's microbatches of a step under any plan of its pieces."""
        pieces = self._pieces(step)
        own = [group_of(groups, self._planning.data_rank) for groups in plan.microbatches]
        packs = [tuple(pieces[number] for number in group.pieces) for group in own]
        built = (build_batch(self._store, pack, vocab_size=self._vocab_size) for pack in packs)
        return [replace(batch, degree=group.degree) for batch, group in zip(built, own, strict=True)]

    def lengths(self, step: int) -> list[int]:
        """What each piece of a step counts in the plan: its tokens, or its cost where it has one."""
        return [piece.weight for piece in self._pieces(step)]

    def figures(self) -> dict[str, float]:
        """Groups per microbatch and predicted time of the last `step`."""
        return {} if self.plan is None else plan_figures(self.plan)

    def forget(self) -> None:
        """Drop what was planned and read ahead, once neither is under way; see `StepLoader.forget`."""
        planned, self._planned = self._planned, None
        received, self._received = self._received, None
        futures: list[Future[Any]] = [planned[1]] if planned else []
        futures += [received[2]] if received and len(received) == 3 else []
        for future in futures:
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        """Stop the threads."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._planner.shutdown(wait=True, cancel_futures=True)
        super().close()

    def _pieces(self, step: int) -> list[Piece]:
        return [piece for pack in self.packs(step) for piece in pack]

    def _plan(self, step: int) -> dict[str, Any]:
        """On the leader: a plan as JSON, or why there is none."""
        try:
            return encode_plan(self._planning.plan(self.lengths(step)))
        except OutOfData as error:
            return {"spent": str(error)}
        except PlanError as error:
            return {"error": f"step {step + 1}: {error}; see step_plan.capacity_tokens"}

    def _receive(self, step: int) -> None:
        """Take part in handing out the plan of a step, and start to read its tokens."""
        message = None
        if self._planning.leader:
            ahead, self._planned = self._planned, None
            ready = ahead is not None and ahead[0] == step
            message = ahead[1].result() if ahead is not None and ready else self._plan(step)
        message = self._planning.share(message)
        if "microbatches" not in message:  # told when the step is asked for: it may never be
            failed = ConfigError(message["error"]) if "error" in message else OutOfData(message["spent"])
            self._received = (step, failed)
            return
        plan = decode_plan(message)
        self._planning.check(plan, self.lengths(step))
        self._received = (step, plan, self._reader.submit(self.batches, step, plan))


def planned_held_out(
    store: Tokens,
    packs: Sequence[Pack],
    planning: Planning,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[HeldOutBatch]:
    """This rank's batches of an evaluation, in groups of one plan that is made once.

    Args:
        store: tokens.
        packs: of `held_out_packs`; only their pieces matter.
        planning: of this rank.
        vocab_size: rows of the model's embedding, checked.
        tokenizer: counts the bytes of documents that have no record of them.

    Returns:
        One batch per microbatch; a group's first rank alone counts its bytes of text.
    """
    pieces = [piece for pack in packs for piece in pack]
    lengths = [piece.weight for piece in pieces]
    plan = decode_plan(planning.share(encode_plan(planning.plan(lengths)) if planning.leader else None))
    planning.check(plan, lengths)
    found = []
    for groups in plan.microbatches:
        group = group_of(groups, planning.data_rank)
        pack = tuple(pieces[number] for number in group.pieces)
        (whole,) = held_out_batches(store, [pack], vocab_size=vocab_size, tokenizer=tokenizer)
        counts = whole.text_bytes is None or group.first_rank == planning.data_rank
        text_bytes = whole.text_bytes if counts else 0.0
        batch = replace(whole.batch, degree=group.degree)
        found.append(HeldOutBatch(batch=batch, text_bytes=text_bytes))
    return found


def group_of(groups: Sequence[Group], data_rank: int) -> Group:
    """The group of a microbatch that a data rank belongs to."""
    return next(g for g in groups if g.first_rank <= data_rank < g.first_rank + g.degree)


def plan_figures(plan: StepPlan) -> dict[str, float]:
    """What metrics say about a plan."""
    groups = sum(len(groups) for groups in plan.microbatches)
    return {
        "plan_groups": groups / max(1, len(plan.microbatches)),
        "plan_predicted_ms": plan.time_ms,
    }


def encode_plan(plan: StepPlan) -> dict[str, Any]:
    """A plan as JSON."""
    microbatches = [
        [[g.degree, g.first_rank, list(g.pieces)] for g in groups] for groups in plan.microbatches
    ]
    return {
        "microbatches": microbatches,
        "time_ms": float(plan.time_ms),
        "lower_bound_ms": float(plan.lower_bound_ms),
    }


def decode_plan(message: dict[str, Any]) -> StepPlan:
    """The plan that `encode_plan` wrote."""
    microbatches = tuple(
        tuple(Group(degree=d, first_rank=first, pieces=tuple(pieces)) for d, first, pieces in groups)
        for groups in message["microbatches"]
    )
    return StepPlan(
        microbatches=microbatches, time_ms=message["time_ms"], lower_bound_ms=message["lower_bound_ms"]
    )
