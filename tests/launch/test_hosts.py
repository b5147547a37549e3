"""`launch torchrun` on two machines with addresses of their own: network namespaces of this one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import overrides, write_corpus

ROOT = Path(__file__).parents[2]
SHELL = '#!/bin/sh\nhost=$1; shift; exec ip netns exec "$host" sh -c "$*"\n'


def missing():
    if os.geteuid() or not shutil.which("ip"):
        return "network namespaces need root and iproute2"
    made = subprocess.run(["ip", "netns", "add", "probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "probe"], capture_output=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def hosts():
    """Two namespaces, named by their addresses, joined by a cable; the hostname resolves in neither."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    network = f"10.{77 + os.getpid() % 100}.0"
    names = [f"{network}.1", f"{network}.2"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "veth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "veth0",
            "netns",
            names[1],
        )
        for name in names:
            ip("-n", name, "addr", "add", f"{name}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            kill(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def kill(name):
    """End whatever runs in a namespace, as a power cut would."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def launch(hosts, tmp_path):
    """Start a tiny training run over both hosts; returns the launcher's process."""
    shell = tmp_path / "shell"
    shell.write_text(SHELL)
    shell.chmod(0o755)
    site = {"scheduler": "none", "hosts": hosts, "ssh": [str(shell)], "network": {"interface": "veth0"}}
    (tmp_path / "site.yaml").write_text(json.dumps(site))
    write_corpus(tmp_path / "docs")
    started = []

    def start(*extra, layout=None, sets=()):
        command = [sys.executable, "-m", "longctx", "launch", "torchrun", "quickstart", "--ssh"]
        command += [f"--site={tmp_path}/site.yaml", "--set=nodes=2", *(f"--set={each}" for each in sets)]
        values = overrides(tmp_path, layout=layout or {"ring": 2})
        log = (tmp_path / "out.txt").open("ab")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, *values, *extra], cwd=ROOT, env=env, stdout=log, stderr=log)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def rows(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds, log):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_hosts_meet_train_and_resume(launch, tmp_path):
    log = tmp_path / "out.txt"
    assert launch("train.steps=3").wait(timeout=110) == 0, log.read_text()[-4000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert launch("train.steps=6", "run.resume=true").wait(timeout=110) == 0, log.read_text()[-4000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_of_two_hosts_dies_and_the_other_goes_on(launch, hosts, tmp_path):
    log, run = tmp_path / "out.txt", tmp_path / "run"
    sets = ["restart={min_nodes: 1, workers: 3}"]
    layout = {"dp_shard": "auto"}
    options = ["train.steps=60", "checkpoint.every=2", "train.eval_every=0", "run.resume=true"]
    process = launch(*options, layout=layout, sets=sets)
    wait_for(lambda: len(rows(run)) >= 4, 110, log)
    kill(hosts[1])
    process.wait(timeout=180)
    assert [row["step"] for row in rows(run)] == list(range(1, 61)), log.read_text()[-4000:]
    assert json.loads((run / "summary.json").read_text())["exit_code"] == 0
    starts = [line for line in (run / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 2
