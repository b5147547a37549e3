"""One Slurm for all tests that need it."""

import tempfile
from pathlib import Path

import pytest
import slurm_cluster


@pytest.fixture(scope="session")
def slurm():
    """A running cluster of three nodes; skipped where Slurm is not installed."""
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)  # munged is another user
        cluster = slurm_cluster.Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
