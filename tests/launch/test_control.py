"""The control server and its handshake, over real sockets."""

import json
import os
import socket
import stat
import threading

import pytest

from launch import local
from launch.control import ADDRESS_FILE, ControlServer, find, in_use
from launch.lines import ClosedError, Lines, admit, connect
from launch.local import Job
from launch.membership import Membership
from launch.protocol import BAD_INPUT


@pytest.fixture
def server(tmp_path):
    server = ControlServer(Membership(size=2), host="127.0.0.1", job="a", folder=tmp_path)
    yield server
    server.close()


def test_two_nodes_join_and_learn_of_a_loss(server, tmp_path):
    nodes = [find(tmp_path, job="a", node=n, first_rank=n, timeout_s=5) for n in range(2)]
    for rank, lines in enumerate(nodes):
        lines.send({"kind": "joined", "rank": rank, "epoch": 0, "state": None})
    assert [lines.one()["kind"] for lines in nodes] == ["form", "form"]
    nodes[0].send({"kind": "lost", "rank": 0, "how": "died", "at": 0.0, "warm": False})
    assert [lines.one() for lines in nodes] == [{"kind": "fence", "epoch": 1}] * 2
    nodes[1].close()
    verdict = nodes[0].one()
    assert verdict["kind"] == "verdict" and "node 1" in verdict["error"]
    nodes[0].close()


def test_the_address_file_is_the_owners_alone_and_the_secret_is_needed(server, tmp_path):
    path = tmp_path / ADDRESS_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    address = json.loads(path.read_text())
    with pytest.raises(ClosedError):
        connect(address["host"], address["port"], "another secret")
    connect(address["host"], address["port"], address["secret"]).close()


def test_the_secret_never_travels():
    ours, theirs = socket.socketpair()
    heard = []

    def serve():
        with pytest.raises(ClosedError):
            admit(ours, "secret", timeout_s=5)

    thread = threading.Thread(target=serve)
    thread.start()
    lines = Lines(theirs)
    heard.append(lines.one())
    lines.send({"nonce": "1", "proof": "secret"})
    thread.join()
    assert "secret" not in json.dumps(heard)
    lines.close()
    ours.close()


def test_a_client_refuses_a_server_that_does_not_know_the_secret():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pose():
            peer, _ = listener.accept()
            lines = Lines(peer)
            lines.send({"nonce": "0"})
            lines.one()
            lines.send({"proof": "guessed"})

        thread = threading.Thread(target=pose)
        thread.start()
        with pytest.raises(ClosedError, match="does not know the job's secret"):
            connect("127.0.0.1", listener.getsockname()[1], "secret")
        thread.join()


def test_an_address_of_an_earlier_start_is_not_enough(tmp_path):
    (tmp_path / ADDRESS_FILE).write_text('{"host": "127.0.0.1", "port": 1, "secret": "old", "job": "a"}')
    with pytest.raises(ClosedError, match=r"run\.dir must be a folder that all nodes share"):
        find(tmp_path, job="a", node=1, first_rank=1, timeout_s=0.3)


def test_a_supervisor_of_another_job_stays_out_and_no_node_is_taken_twice(server, tmp_path):
    with pytest.raises(ClosedError, match="it is of job a, not b"):
        find(tmp_path, job="b", node=1, first_rank=1, timeout_s=0.3)
    first = find(tmp_path, job="a", node=0, first_rank=0, timeout_s=5)
    second = find(tmp_path, job="a", node=0, first_rank=0, timeout_s=5)
    with pytest.raises(ClosedError):
        second.one()
    first.send({"kind": "joined", "rank": 0, "epoch": 0, "state": None})
    first.send({"kind": "joined", "rank": 1, "epoch": 0, "state": None})
    assert first.one()["kind"] == "form"
    first.close()


def test_a_folder_is_in_use_while_its_server_answers(tmp_path):
    assert in_use(tmp_path) == ""
    server = ControlServer(Membership(size=1), host="127.0.0.1", job="a", folder=tmp_path)
    assert f"run.dir={tmp_path}" in in_use(tmp_path)
    job = Job(argv=("x.py",), processes=1, status=tmp_path / "status.json")
    (tmp_path / "status.json").write_text("the other's")
    assert local.run(job) == BAD_INPUT and (tmp_path / "status.json").exists()
    server.close()
    assert in_use(tmp_path) == ""


def test_a_host_that_vanishes_is_noticed(server, tmp_path):
    lines = find(tmp_path, job="a", node=0, first_rank=0, timeout_s=5)
    with socket.socket(fileno=os.dup(lines.fileno())) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
    lines.close()
