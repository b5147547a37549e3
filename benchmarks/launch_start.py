"""The start of a job on many nodes, all played by this machine: preflight, choice of nodes, torchrun, torch.

What is real: every node's preflight process, `begin` over all answers, the batch script's own `node.sh` with
the real torchrun, and on each node one worker that imports what `longctx train` imports, and then torch. What
is not: the nodes share these cores (processor time is given beside the clock's) and one file system that has
everything in its cache; each node meets only itself, since 64 torchruns do not meet at one rendezvous within
minutes on two cores; srun's own start is not in it; and a node has one worker in the place of eight, so the
file-system calls of a rank are put together from their parts.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from harness import Figure, median

BEFORE_TORCH = "import longctx.__main__, longctx.config.load, longctx.cli.train, longctx.cli.worker"
WORKER = """import json, os, sys, time
{before}
early = time.time()
{torch}
with open(os.path.join(sys.argv[1], "rank-" + os.environ["NODE"]), "w") as file:
    json.dump([early, time.time()], file)
"""
NO_STRACE = "strace is not installed"
NODES = 64
RANKS = 8
"""Ranks of a node in the file-system figures."""


def measure(base: Path, *, nodes: int, calls: bool) -> dict[str, Figure]:
    """Seconds of the start on many nodes and on one, and with `calls` the file-system calls of a rank."""
    together, alone = _start(base / "many", nodes), _start(base / "one", 1)
    many = f"on {nodes} nodes at once"
    return {
        "start_nodes": Figure(nodes, "count", "nodes that this machine plays"),
        "start_preflight_s": Figure(together["preflight"], "s", f"preflight {many}"),
        "start_begin_s": Figure(together["begin"], "s", f"choice and order of {nodes} nodes"),
        "start_torch_s": Figure(
            together["torch"], "s", f"node.sh {many} until the last rank has imported torch"
        ),
        "start_cpu_s": Figure(together["cpu"] / nodes, "s", "of it, processor time of one node"),
        "start_one_preflight_s": Figure(alone["preflight"], "s", "preflight on one node alone"),
        "start_one_torch_s": Figure(alone["torch"], "s", "one node alone until its rank has imported torch"),
        "start_one_cpu_s": Figure(alone["cpu"], "s", "of it, processor time"),
        "start_to_torch_s": Figure(alone["early"], "s", "one node alone until its rank turns to torch"),
        **(_file_calls(base / "calls") if calls else {}),
    }


def _start(base: Path, nodes: int) -> dict[str, float]:
    """Seconds of the parts of one start."""
    names = [f"node{index:03d}" for index in range(nodes)]
    scratch = base / "launch" / "1.0"
    scratch.mkdir(parents=True)
    begun = time.time()
    _all([_env(scratch, SLURMD_NODENAME=name) for name in names], _preflight(scratch))
    checked = time.time()
    subprocess.run(_begin(base, names), cwd=harness.ROOT, env=_env(scratch), check=True, capture_output=True)
    chosen, spent = time.time(), _cpu()
    envs = [_env(scratch / name, **_node(), NODE=name) for name in names]
    _all(envs, _node_words(base, WORKER.format(before=BEFORE_TORCH, torch="import torch")))
    told = [json.loads(path.read_text()) for path in base.glob("rank-*")]
    if len(told) != nodes:
        raise RuntimeError(f"{len(told)} of {nodes} ranks got to torch; see {scratch}/node-*/torchrun.log")
    return {
        "preflight": checked - begun,
        "begin": chosen - checked,
        "torch": max(late for _, late in told) - chosen,
        "early": median([early for early, _ in told]) - chosen,
        "cpu": _cpu() - spent,
    }


def _file_calls(base: Path) -> dict[str, Figure]:
    """File-system calls under strace: of preflight, of one whole node, of its worker alone."""
    names = ("preflight_file_calls", "worker_file_calls", "rank_file_calls")
    if shutil.which("strace") is None:
        return {name: Figure(None, "count", NO_STRACE) for name in names}
    base.mkdir()
    env = _env(base, **_node(), NODE="0")
    worker = WORKER.format(before=BEFORE_TORCH, torch="import torch")
    preflight = _traced(base, _preflight(base), env)
    early = _traced(base, [sys.executable, "-c", BEFORE_TORCH], env)
    alone = _traced(base, [sys.executable, "-c", worker, str(base)], env)
    node = preflight + _traced(base, _node_words(base, worker), env) - alone
    return {
        "preflight_file_calls": Figure(preflight, "count", "file-system calls of one node's preflight"),
        "early_file_calls": Figure(early, "count", "a worker before the import of torch"),
        "worker_file_calls": Figure(alone, "count", "a worker, the import of torch included"),
        "node_file_calls": Figure(node, "count", "a node apart from its workers: preflight, shell, torchrun"),
        "rank_file_calls": Figure(alone + node / RANKS, "count", f"a rank's share on nodes of {RANKS}"),
    }


def _traced(base: Path, words: list[str], env: dict[str, str]) -> int:
    log = base / "strace"
    traced = ["strace", "-f", "-e", "trace=%file,getdents64", "-o", str(log), *words]
    subprocess.run(traced, cwd=harness.ROOT, env=env, check=True, capture_output=True)
    return sum(" = " in line for line in log.read_text(errors="replace").splitlines())


def _all(envs: list[dict[str, str]], words: list[str]) -> None:
    """Run a command in all environments at once."""
    nowhere = subprocess.DEVNULL
    running = [
        subprocess.Popen(words, cwd=harness.ROOT, env=env, stdout=nowhere, stderr=nowhere) for env in envs
    ]
    codes = [process.wait(timeout=500) for process in running]
    if any(codes):
        raise RuntimeError(f"{words[:4]}: exit codes {sorted(set(codes))}")


def _preflight(scratch: Path) -> list[str]:
    return [sys.executable, "-m", "launch", "preflight", f"--out={scratch}"]


def _begin(base: Path, names: list[str]) -> list[str]:
    words = ["--attempt=1.0", "--later=0", f"--nodes={len(names)}", f"--processes={RANKS}", "--preflight"]
    words += ["--no-progress=3", "--progress=ckpt/*", "--topology=slurm", f"--candidates={' '.join(names)}"]
    return [sys.executable, "-m", "launch", "begin", f"--folder={base}", *words]


def _node_words(base: Path, program: str) -> list[str]:
    script = base / "worker.py"
    script.write_text(program)
    node = harness.ROOT / "launch" / "templates" / "node.sh"
    return ["bash", str(node), "1", sys.executable, str(script), str(base)]


def _node() -> dict[str, str]:
    """What the batch script tells node.sh."""
    return {
        "SLURM_PROCID": "0",
        "LAUNCH_NODES": "1",
        "LAUNCH_PROCESSES": "1",
        "LAUNCH_ADDRESS": "127.0.0.1",
        "LAUNCH_PORT": "0",
        "LAUNCH_ID": "start",
        "LAUNCH_LOG_LIMIT": str(2**20),
        "LAUNCH_RESTARTS": "0",
        "LAUNCH_TIMEOUT": "600",
    }


def _env(scratch: Path, **more: str) -> dict[str, str]:
    ours = {"PYTHONPATH": str(harness.ROOT), "OMP_NUM_THREADS": "1", "LAUNCH_LOGS": str(scratch)}
    return {**os.environ, **ours, **more}


def _cpu() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="launch-start-") as folder:
        nodes = 2 if args.quick else NODES
        figures = measure(Path(folder, "start"), nodes=nodes, calls=not args.quick)
    harness.report(__file__, figures, args)


if __name__ == "__main__":
    main()
