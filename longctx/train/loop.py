"""The training loop: build or resume, step until done or stopped, leave a run folder behind."""

import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from parallel import comm

from .. import checkpoint
from ..build import Run, World, build
from ..config.schema import Config
from ..data.sources import open_data
from ..errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from ..eval.evaluate import check as check_evaluation
from ..eval.evaluate import evaluate as evaluate_by_position
from ..eval.evaluate import figures
from ..eval.files import write as write_report
from ..protocol import BAD_INPUT, DONE, FAILED, REQUEUE
from . import throughput
from .begin import begin
from .report import box, opening
from .run_folder import METRICS, RunFolder
from .schedule import learning_rate
from .sinks import JsonlSink, Row, Sink, TerminalSink, WandbSink
from .step import StepResult, evaluate, train_step
from .stop import StopRequest


@dataclass(kw_only=True, slots=True)
class Session:
    """A run and what this process keeps beside it."""

    run: Run
    folder: RunFolder
    stop: StopRequest
    sinks: list[Sink]
    peak: float | None
    saver: checkpoint.Saver
    last: Row = field(default_factory=dict)
    saved: Path | str | None = None


def train(config: Config, world: World) -> int:
    """Train as `config` says, as one rank of `world`.

    Args:
        config: resolved for `world.size`.
        world: this process among the others.

    Returns:
        Exit code: 0 done, 2 bad config or input, 64 stopped by a signal and saved, 1 failed.
    """
    folder = RunFolder(config, rank=world.rank)
    stop = StopRequest()
    try:
        run = build(config, world)
        folder.resolved(run.config)
        session = _open(run, folder, stop)
        try:
            code = _steps(session)
        finally:
            for sink in session.sinks:
                sink.close()
        _leave(session, code)
        run.close()
        return code
    except (ConfigError, DataError) as error:
        return _fail(folder, world, error, BAD_INPUT)
    except (TrainingDiverged, CheckpointError) as error:
        return _fail(folder, world, error, FAILED)
    except Exception as error:
        folder.log.error("%s", traceback.format_exc())
        folder.event("error", error=repr(error))
        folder.finish(FAILED, error=repr(error))
        raise
    finally:
        stop.restore()


def _open(run: Run, folder: RunFolder, stop: StopRequest) -> Session:
    """Resume if asked to, open the sinks, say what is about to happen."""
    found = checkpoint.resume(run, checkpoint.checkpoints_folder(run)) if run.config.run.resume else None
    if found is None and run.config.checkpoint.init_from:
        begin(run, run.config.checkpoint.init_from)
    if run.config.eval.every_tokens:
        check_evaluation(run, open_data(run.config.data))
    peak = throughput.peak_flops(run.world.device, throughput.dtype_of(run))
    if run.world.rank == 0:
        print(opening(run, found, throughput.estimate_seconds(run, peak)), flush=True)
    folder.event("start", step=run.progress.step, resumed_from=found and str(found))
    return Session(
        run=run,
        folder=folder,
        stop=stop,
        sinks=_sinks(run),
        peak=peak,
        saver=checkpoint.Saver(run),
        saved=found,
    )


def _sinks(run: Run) -> list[Sink]:
    if run.world.rank != 0:
        return []
    path = Path(run.config.run.dir)
    sinks: list[Sink] = [
        JsonlSink(path / METRICS, resumed_step=run.progress.step),
        TerminalSink(steps=run.config.train.steps, done=run.progress.step),
    ]
    if run.config.metrics.wandb != "off":
        sinks.append(WandbSink(run.config.metrics, path, asdict(run.config)))
    return sinks


def _steps(session: Session) -> int:
    run, config = session.run, session.run.config
    spent = _spent(run)
    while run.progress.step < config.train.steps:
        started = time.perf_counter()
        result = _one_step(session)
        done = run.progress.step
        last = done == config.train.steps
        row = _row(session, result, time.perf_counter() - started)
        for source in set(_spent(run)) - set(spent):
            session.folder.event("exhausted", step=done, source=source)
            spent.append(source)
        if run.held_out and (last or (config.train.eval_every and done % config.train.eval_every == 0)):
            row |= evaluate(run)
        if _due(config.eval.every_tokens, run.progress.tokens, result.tokens):
            row |= _by_position(session)
        if last or "held_out_loss" in row or "eval_s" in row or done % config.metrics.log_every == 0:
            _write(session, row)
        if result.stops:
            _save(session, last=True)
            session.folder.event("stop", step=done, signal=session.stop.name)
            return REQUEUE
        if last or (config.checkpoint.every and done % config.checkpoint.every == 0):
            _save(session, last=last)
    return DONE


def _due(every: int, tokens: int, new: int) -> bool:
    """Whether the last `new` of `tokens` crossed a multiple of `every`."""
    return bool(every) and tokens // every > (tokens - new) // every


def _by_position(session: Session) -> Row:
    """Evaluate by position and length, into the run folder and the step's row."""
    run = session.run
    report = evaluate_by_position(run, open_data(run.config.data), budget_s=run.config.eval.budget_s)
    if run.world.rank == 0:
        write_report(report, session.folder.path / "eval" / f"step-{run.progress.step}")
    found = {key: report[key] for key in ("step", "seconds", "left_out")}
    session.folder.event("eval", **found)
    return dict(figures(report))


def _spent(run: Run) -> list[str]:
    """Sources that had nothing more to give after the last step."""
    return run.loader.exhausted(run.progress.step - 1) if run.progress.step else []


def _one_step(session: Session) -> StepResult:
    run = session.run
    step = run.progress.step
    try:
        return train_step(run, learning_rate(step, run.config.train), stop=session.stop.asked)
    except TrainingDiverged as error:
        documents = ", ".join(run.loader.documents(step)[:8])
        session.saver.wait()
        raise TrainingDiverged(
            f"step {step + 1}: {error}; parameters were not updated. Documents of the step: {documents}. "
            f"Last good checkpoint: {session.saved or 'none'}. Lower train.lr and resume"
        ) from error


def _row(session: Session, result: StepResult, seconds: float) -> Row:
    run = session.run
    step = run.progress.step - 1
    lengths = throughput.step_lengths(run, step)
    seconds, wait, memory = _slowest(run, seconds, run.loader.wait_s, _peak_memory_gib(run.world.device))
    flops = throughput.step_flops(run, step)
    return {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": learning_rate(step, run.config.train),
        "step_time_s": seconds,
        "useful_tokens_per_s": result.tokens / seconds,
        "padded_tokens_per_s": sum(lengths) / seconds,
        "mfu": flops / seconds / (session.peak * run.world.size) if session.peak else None,
        "peak_memory_gib": memory,
        "data_wait_s": wait,
        "documents": len(lengths),
        "max_document_tokens": max(lengths, default=0),
        **run.loader.figures(),
        **result.groups,
    }


def _slowest(run: Run, *values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=run.world.device)
    return comm.all_reduce(tensor, group=run.mesh.group("world"), op="max").tolist()


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB


def _write(session: Session, row: Row) -> None:
    session.last |= row
    for sink in session.sinks:
        sink.write(row)


def _save(session: Session, *, last: bool) -> None:
    """Save; in the background while there are steps to come. `stall_s` is what training waited."""
    started = time.perf_counter()
    background = session.run.config.checkpoint.background and not last
    path = session.saver.save(background=background)
    stall = round(time.perf_counter() - started, 4)
    session.folder.event("checkpoint", step=session.run.progress.step, path=str(path), stall_s=stall)
    session.saved = path


def _leave(session: Session, code: int) -> None:
    """The last words of a run that ended well or was asked to stop."""
    figures: dict[str, Any] = session.last | {"checkpoint": session.saved and str(session.saved)}
    session.folder.event("end", exit_code=code, step=session.run.progress.step)
    session.folder.finish(code, **figures)
    if session.run.world.rank == 0:
        box(session.run, figures, stopped_by=session.stop.name if code == REQUEUE else None)


def _fail(folder: RunFolder, world: World, error: Exception, code: int) -> int:
    folder.event("error", error=str(error))
    folder.finish(code, error=str(error))
    if world.rank == 0:
        print(f"error: {error}", flush=True)
    return code
