"""The two sides that share only plain data agree: launch, longctx, and the text in docs/protocol.md."""

from pathlib import Path

import launch.protocol
import longctx.protocol
from longctx.cli.start import TORCHRUN_VARIABLES
from longctx.protocol import STATUS

TEXT = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()
CODES = ("DONE", "FAILED", "BAD_INPUT", "PREFLIGHT_FAILED", "REQUEUE", "NO_PROGRESS")


def test_exit_codes_agree_and_are_written_down():
    for name in CODES:
        code = getattr(longctx.protocol, name)
        assert getattr(launch.protocol, name) == code
        assert f"| {code} | `{name}` |" in TEXT
    assert [getattr(launch.protocol, name) for name in CODES] == [0, 1, 2, 3, 64, 65]


def test_keys_agree_and_are_written_down():
    for name in ("STATUS_KEYS", "HEARTBEAT_KEYS"):
        keys = getattr(longctx.protocol, name)
        assert getattr(launch.protocol, name) == keys
        assert all(f"| `{key}` |" in TEXT for key in keys)


def test_launch_reads_what_longctx_writes(tmp_path):
    path = tmp_path / "run" / STATUS
    assert longctx.protocol.write_status(path, 64, rank=3, error='said "so"\n')
    status = launch.protocol.read_status(path)
    assert status == launch.protocol.Status(exit_code=64, rank=3, error='said "so"\n')
    assert [each.name for each in path.parent.iterdir()] == [STATUS]


def test_the_first_word_about_the_end_stands(tmp_path):
    path = tmp_path / STATUS
    assert longctx.protocol.write_status(path, 2, rank=1, error="true cause")
    assert not longctx.protocol.write_status(path, 1, rank=0, error="peer lost")
    assert launch.protocol.read_status(path) == launch.protocol.Status(
        exit_code=2, rank=1, error="true cause"
    )


def test_the_variables_of_torchrun_are_written_down():
    assert all(f"`{name}`" in TEXT for name in TORCHRUN_VARIABLES)
