"""`longctx chaos FILE ...`: train while faults strike, and say how the run got over them."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..claim import check_unused
from ..config.load import LoadedConfig, load
from ..errors import ConfigError
from .arguments import make_parser, parse
from .machine import choose_local
from .start import launcher, under_torchrun
from .supervise import become_supervisor

FOLDER = "chaos"
PLAN = "plan.json"
RANDOM_PHASES = ("data", "forward", "backward", "reduce", "optimizer", "replicate")


def run(argv: Sequence[str]) -> int:
    """Train with faults: alone, start local processes and report; under torchrun, be one of them."""
    arguments = parse(_parser(), argv)
    loaded, options = load(arguments.files, arguments.overrides), arguments.options
    folder = Path(loaded.config.run.dir)
    plan = folder / FOLDER / PLAN
    if under_torchrun():
        size = int(os.environ["WORLD_SIZE"])
        _check(loaded, size)
        _confirm(options)
        if options.strike or options.random:  # otherwise the plan is there already
            _plan_once(loaded, options, plan, size)
        become_supervisor(loaded, ["--faults", str(plan)])
    check_unused(folder, resume=loaded.config.run.resume)
    size = choose_local(loaded.config).processes
    _check(loaded, size)
    _write_plan(loaded, options, plan, size)
    launch = launcher("chaos", loaded, folder=folder, options=["--yes"])
    code = _run([sys.executable, "-m", "launch", *launch])
    found = report(folder)
    print(json.dumps(found) if options.json else _text(found))
    return code


def _run(command: list[str]) -> int:
    """Run the launcher, which gets the signals that this process gets."""
    with subprocess.Popen(command) as launched:
        before = signal.signal(signal.SIGTERM, lambda number, frame: launched.send_signal(number))
        try:
            while True:
                try:
                    return launched.wait()
                except KeyboardInterrupt:
                    continue  # the terminal has told the launcher too
        finally:
            signal.signal(signal.SIGTERM, before)


def report(folder: Path) -> dict[str, Any]:
    """What a rehearsal's events say."""
    struck = [json.loads(path.read_text()) for path in sorted((folder / FOLDER).glob("struck-*.json"))]
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    recoveries = [event for event in events if event["kind"] == "recovered"]
    planned = json.loads((folder / FOLDER / PLAN).read_text())
    return {
        "planned": len(planned),
        "faults": len(struck),
        "recoveries": len(recoveries),
        "mismatches": sum(event["kind"] == "mismatch" for event in events),
        "resume_s": [event["resume_s"] for event in recoveries],
        "steps_redone": [event["steps_redone"] for event in recoveries],
        "checkpoints_read": sum("checkpoint" in event for event in recoveries),
    }


def _text(found: dict[str, Any]) -> str:
    seconds = ", ".join(f"{each:.2f}" for each in found["resume_s"]) or "none"
    return (
        f"{found['faults']} of {found['planned']} faults struck, {found['recoveries']} recoveries; "
        f"seconds to resume: {seconds}; steps computed again: {sum(found['steps_redone'])}, "
        f"of which {found['mismatches']} came out different"
    )


def _plan_once(loaded: LoadedConfig, options: argparse.Namespace, path: Path, size: int) -> None:
    """On rank 0, before there is a supervisor; a restart by torchrun goes on with the plan."""
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        check_unused(path.parents[1], resume=loaded.config.run.resume)
        _write_plan(loaded, options, path, size)


def _write_plan(loaded: LoadedConfig, options: argparse.Namespace, path: Path, size: int) -> None:
    from ..recovery.faults import Fault, write_plan

    steps = loaded.config.train.steps
    if not 0 <= options.random < steps or options.spread_s < 0:
        raise ConfigError(
            f"--random {options.random} --spread-s {options.spread_s:g}: choose 0 to {steps - 1} kills, each "
            f"in a step of its own after the first (train.steps={steps}), and no negative seconds"
        )
    faults = [_fault(text) for text in options.strike]
    chooser = random.Random(options.seed)
    for step in sorted(chooser.sample(range(1, steps), options.random)):
        phase = chooser.choice(RANDOM_PHASES)
        after = chooser.random() * options.spread_s
        faults.append(Fault(step=step, rank=chooser.randrange(size), phase=phase, after_s=after))
    for fault in faults:
        fault.check(size, steps)
    if not faults:
        raise ConfigError("nothing to rehearse; add --strike STEP:RANK:PHASE[:KIND] or --random N")
    for mark in path.parent.glob("struck-*.json"):
        mark.unlink()
    write_plan(faults, path)


def _fault(text: str) -> Any:
    from ..recovery.faults import ANY_STEP, Fault

    try:
        where, rank, phase, kind = (text if text.count(":") > 2 else f"{text}:kill").split(":")
        step = ANY_STEP if where == "*" else int(where)
        return Fault(step=step, rank=int(rank), phase=phase, kind=kind)
    except ValueError as error:
        raise ConfigError(
            f"--strike {text} is not STEP:RANK:PHASE[:KIND], for example 3:1:backward:kill"
        ) from error


def _check(loaded: LoadedConfig, size: int) -> None:
    if size == 1 or loaded.config.recovery.mode == "off":
        raise ConfigError(
            f"a rehearsal on {size} processes with recovery.mode={loaded.config.recovery.mode} would only "
            "end the run; set run.processes to at least 2 and recovery.mode=replicate"
        )


def _confirm(options: argparse.Namespace) -> None:
    if not options.yes:
        raise ConfigError("chaos kills processes of this job; add --yes outside a local run")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("chaos", "Train while faults strike, and say how the run got over them.")
    parser.add_argument(
        "--strike", action="append", default=[], metavar="STEP:RANK:PHASE[:KIND]", help="a fault"
    )
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="N kills at random steps and phases"
    )
    parser.add_argument("--spread-s", type=float, default=0.0, help="random kills strike up to so much later")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--yes", action="store_true", help="needed where torchrun has been started by hand")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    return parser
