"""The training loop: build or resume, step until done or stopped, leave a run folder behind."""

import time
import traceback
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .. import checkpoint
from ..build import Run, build
from ..config.schema import Config
from ..data.sources import open_data
from ..errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NoProgress,
    OutOfData,
    ReplicasDiffer,
    StateLost,
    TrainingDiverged,
)
from ..eval.evaluate import check as check_evaluation
from ..eval.evaluate import evaluate as evaluate_by_position
from ..eval.evaluate import figures
from ..eval.files import write as write_report
from ..protocol import BAD_INPUT, DONE, FAILED, NO_PROGRESS, REQUEUE
from ..recovery.members import Members
from ..spike import LossSpike
from . import throughput
from .answer import answer
from .begin import begin
from .goodput import Goodput
from .report import box, opening
from .row import make_row
from .run_folder import METRICS, RunFolder
from .saves import Saves
from .schedule import learning_rate
from .sinks import COMPUTED, JsonlSink, Row, Sink, TerminalSink, WandbSink
from .step import StepResult, evaluate, train_step
from .stop import StopRequest


@dataclass(kw_only=True, slots=True)
class Outlets:
    """What this process keeps whatever becomes of the other ranks."""

    folder: RunFolder
    stop: StopRequest
    started: float = field(default_factory=time.monotonic)
    sinks: list[Sink] | None = None
    goodput: Goodput | None = None
    peak: float | None = None
    stepping: bool = False
    last: Row = field(default_factory=dict)

    def close(self) -> None:
        """Flush and release."""
        for sink in self.sinks or ():
            sink.close()
        self.stop.restore()


@dataclass(kw_only=True, slots=True)
class Session:
    """A run on one membership of ranks, and where its words go."""

    run: Run
    out: Outlets
    members: Members
    saves: Saves


def train(config: Config, members: Members) -> int:
    """Train as `config` says, as one rank.

    Args:
        config: resolved for the number of ranks.
        members: gives the world that this process is in; the next one when a rank is lost.

    Returns:
        Exit code: 0 done, 2 bad config or input, 64 stopped by a signal and saved, 65 the state is
        lost, 1 failed.
    """
    out = Outlets(folder=RunFolder(config, rank=members.rank, replaces=members.replaces), stop=StopRequest())
    try:
        while True:
            code = _membership(config, members, out)
            if code is not None:
                return code
    except (ConfigError, DataError) as error:
        return _fail(out.folder, members, error, BAD_INPUT)
    except NoProgress as error:
        return _fail(out.folder, members, error, NO_PROGRESS)
    except (TrainingDiverged, CheckpointError, ReplicasDiffer) as error:
        return _fail(out.folder, members, error, FAILED)
    except Exception as error:
        out.folder.log.error("%s", traceback.format_exc())
        out.folder.event("error", error=repr(error))
        out.folder.finish(FAILED, error=repr(error))
        raise
    finally:
        out.close()


def _membership(config: Config, members: Members, out: Outlets) -> int | None:
    """Build, restore or resume, and step, until the end; None: a rank was lost, and others form."""
    run = session = None
    try:
        world = members.form(config)
        run = build(config, world, members.known())
        run.pulse = members.pulse
        session = _open(run, members, out)
        code = _steps(session)
        if members.end(code):
            _leave(session, code)
            run.close()
            return code
    except Exception as error:
        if not members.survives(error):
            raise
        out.folder.log.info("a rank was lost: %s", error)
    # Here the traceback is gone, and with it the last hold on the run's tensors and groups.
    _abandon(run, session, members)
    return None


def _abandon(run: Run | None, session: Session | None, members: Members) -> None:
    """Let go of a run whose ranks are not all there any more; nothing here waits for them."""
    members.close()
    if session is not None:
        session.saves.abandon()
    if run is not None:
        run.close()
    elif dist.is_initialized():
        dist.destroy_process_group()


def _open(run: Run, members: Members, out: Outlets) -> Session:
    """Restore or resume, open the sinks, say what is about to happen."""
    out.peak = throughput.peak_flops(run.world.device, throughput.dtype_of(run))
    restored = members.restore(run)
    resumes = restored is None and (run.config.run.resume or members.restarted)
    found = _resumed(run, members, out) if resumes else None
    if restored is None and found is None and run.config.checkpoint.init_from:
        begin(run, run.config.checkpoint.init_from)
    saves = Saves(run, out.folder, found=found)
    session = Session(run=run, out=out, members=members, saves=saves)
    if restored is not None:
        saves.look()
    if restored is None:
        _introduce(session, found)
    elif out.sinks is None:
        _open_sinks(run, out, resumed_step=None)
    members.begin(run)
    if restored is not None:
        out.folder.event("recovered", **restored.event)
        _finish_step(session, restored.row)
    return session


def _resumed(run: Run, members: Members, out: Outlets) -> Path | str | None:
    """Go on from the newest checkpoint; what has committed steps never begins anew unasked."""
    found = checkpoint.resume(run, checkpoint.checkpoints_folder(run))
    if found is None and members.restarted and out.folder.has_steps():
        raise StateLost(
            f"torchrun has started the run again, {out.folder.path} holds steps, and there is no checkpoint "
            "to go back to; set checkpoint.every, and begin anew with another run.dir"
        )
    return found


def _introduce(session: Session, found: Path | str | None) -> None:
    """The first words of a run."""
    run, out = session.run, session.out
    out.folder.resolved(run.config)
    if run.config.eval.every_tokens:
        check_evaluation(run, open_data(run.config.data))
    if run.world.rank == 0:
        print(opening(run, found, throughput.estimate_seconds(run, out.peak)), flush=True)
    out.folder.event("start", step=run.progress.step, resumed_from=found and str(found))
    if out.sinks is None:
        _open_sinks(run, out, resumed_step=run.progress.step)


def _open_sinks(run: Run, out: Outlets, *, resumed_step: int | None) -> None:
    out.sinks = []
    if run.world.rank != 0:
        return
    path = out.folder.path
    out.sinks = [
        JsonlSink(path / METRICS, resumed_step=resumed_step, mismatch=partial(_mismatch, out.folder)),
        TerminalSink(steps=run.config.train.steps, done=run.progress.step),
    ]
    if run.config.metrics.wandb != "off":
        out.sinks.append(WandbSink(run.config.metrics, path, asdict(run.config)))
    out.goodput = Goodput(out.folder)


def _mismatch(folder: RunFolder, before: Row, again: Row) -> None:
    """A step that was computed again after a recovery came out different."""
    differ = {
        name: [before.get(name), again.get(name)] for name in COMPUTED if before.get(name) != again.get(name)
    }
    folder.event("mismatch", step=before["step"], **differ)
    print(f"step {before['step']} computed again differs: {differ}", flush=True)


def _steps(session: Session) -> int:
    run, config, out = session.run, session.run.config, session.out
    spent = _spent(run)
    while run.progress.step < config.train.steps:
        started = time.perf_counter()
        result = _one_step(session)
        done = run.progress.step
        last = done == config.train.steps
        seconds, behind = time.perf_counter() - started, session.members.behind()
        save_s = session.saves.measured_s
        row, behind, save_s = make_row(run, result, seconds, peak=out.peak, behind=behind, save_s=save_s)
        session.saves.saw(step_s=row["step_time_s"], save_s=save_s)
        for source in set(_spent(run)) - set(spent):
            out.folder.event("exhausted", step=done, source=source)
            spent.append(source)
        if run.held_out and (last or (config.train.eval_every and done % config.train.eval_every == 0)):
            row |= evaluate(run)
        if _due(config.eval.every_tokens, run.progress.tokens, result.tokens):
            row |= _by_position(session)
        if not out.stepping:
            out.stepping = True
            out.folder.event("stepping", step=done)
        session.members.keep(run, row, behind=behind)
        _finish_step(session, row, stops=result.stops > 0)
        if result.stops:
            out.folder.event("stop", step=done, signal=out.stop.name)
            return REQUEUE
    return DONE


def _finish_step(session: Session, row: Row | None, *, stops: bool = False) -> None:
    """What follows a step once its state is safe; doing it again after a recovery changes nothing."""
    config, done, goodput = session.run.config, session.run.progress.step, session.out.goodput
    last = stops or done == config.train.steps
    if row is not None and goodput is not None:
        row |= goodput.after(done, row["step_time_s"])
    if row is not None and (
        last or "held_out_loss" in row or "eval_s" in row or done % config.metrics.log_every == 0
    ):
        _write(session, row)
    if done and (last or session.saves.due(done)):
        session.saves.save(last=last)


def _due(every: int, tokens: int, new: int) -> bool:
    """Whether the last `new` of `tokens` crossed a multiple of `every`."""
    return bool(every) and tokens // every > (tokens - new) // every


def _by_position(session: Session) -> Row:
    """Evaluate by position and length, into the run folder and the step's row."""
    run = session.run
    report = evaluate_by_position(run, open_data(run.config.data), budget_s=run.config.eval.budget_s)
    if run.world.rank == 0:
        write_report(report, session.out.folder.path / "eval" / f"step-{run.progress.step}")
    found = {key: report[key] for key in ("step", "seconds", "left_out")}
    session.out.folder.event("eval", **found)
    return dict(figures(report))


def _spent(run: Run) -> list[str]:
    """Sources that had nothing more to give after the last step."""
    return run.loader.exhausted(run.progress.batch(run.progress.step - 1)) if run.progress.step else []


def _one_step(session: Session) -> StepResult:
    run = session.run
    while True:
        try:
            return train_step(
                run, learning_rate(run.progress.step, run.config.train), stop=session.out.stop.asked
            )
        except LossSpike as spike:
            try:
                if answer(run, spike, session.members, session.out.folder):
                    _forget(session)
            except TrainingDiverged as error:
                session.saves.wait()
                newest = session.saves.newest or "none"
                raise TrainingDiverged(f"{error}. Last good checkpoint: {newest}") from spike
        except OutOfData as error:  # on every rank, so all can save; another DataError may be one rank's
            session.saves.keep_last()
            raise OutOfData(f"{error}. Newest checkpoint: {session.saves.newest or 'none'}") from error


def _forget(session: Session) -> None:
    """Drop the rows and checkpoints of steps that are done again with other batches."""
    out = session.out
    session.saves.forget()
    for sink in out.sinks or ():
        sink.forget(session.run.progress.step)
    if out.goodput is not None:
        out.goodput = Goodput(out.folder)


def _write(session: Session, row: Row) -> None:
    session.out.last |= row
    for sink in session.out.sinks or ():
        sink.write(row)


def _leave(session: Session, code: int) -> None:
    """The last words of a run that ended well or was asked to stop."""
    newest = session.saves.newest
    figures: dict[str, Any] = session.out.last | {"checkpoint": newest and str(newest)}
    session.out.folder.event("end", exit_code=code, step=session.run.progress.step)
    session.out.folder.finish(code, **figures)
    if session.run.world.rank == 0:
        box(session.run, figures, stopped_by=session.out.stop.name if code == REQUEUE else None)


def _fail(folder: RunFolder, members: Members, error: Exception, code: int) -> int:
    folder.event("error", error=str(error))
    folder.finish(code, error=str(error))
    members.fail(code, str(error))
    return code
