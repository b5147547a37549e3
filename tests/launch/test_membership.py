"""What the control server decides, as literals: no socket, no clock."""

from launch.membership import BROKEN_GRACE_S, ENDED_GRACE_S, SILENCE_S, Limits, Membership
from launch.protocol import DONE, FAILED, NO_PROGRESS, REQUEUE

NODE = {"node": 0, "first_rank": 0}


def join_all(members, epoch, *, now=0.0, ranks=None):
    out = []
    for rank in ranks or range(members.size):
        out += members.handle({"kind": "joined", "rank": rank, "epoch": epoch, "state": {"of": rank}}, now)
    return out


def ticks(members, first, last):
    """What is said from one second to another."""
    return [message for now in range(first, last + 1) for message in members.tick(float(now))]


def lost(rank, how="died, killed by SIGKILL"):
    return {"kind": "lost", "rank": rank, "how": how, "at": 1.0, "warm": True}


def test_a_membership_forms_when_every_rank_has_joined_and_carries_their_states():
    members = Membership(size=3)
    assert join_all(members, 0, ranks=[2, 0]) == []
    (form,) = join_all(members, 0, ranks=[1])
    assert form == {
        "kind": "form",
        "epoch": 0,
        "first": True,
        "lost": [],
        "ranks": [{"of": 0}, {"of": 1}, {"of": 2}],
    }


def test_a_lost_rank_begins_an_epoch_which_forms_anew_and_names_it():
    members = Membership(size=2)
    join_all(members, 0)
    assert members.handle(lost(1), 2.0) == [{"kind": "fence", "epoch": 1}]
    assert join_all(members, 0, ranks=[0]) == [{"kind": "fence", "epoch": 1}]  # it had not heard
    (form,) = join_all(members, 1)
    assert form["epoch"] == 1 and form["first"]  # no state was anywhere yet
    assert [each["rank"] for each in form["lost"]] == [1]


def test_a_run_has_begun_when_every_ranks_first_state_has_a_copy():
    members = Membership(size=2)
    join_all(members, 0)
    members.handle({"kind": "running", "rank": 0, "epoch": 0}, 1.0)
    members.handle(lost(1), 1.1)
    assert join_all(members, 1)[0]["first"]
    for rank in range(2):
        members.handle({"kind": "running", "rank": rank, "epoch": 1}, 2.0)
    members.handle(lost(1), 2.1)
    assert not join_all(members, 2)[0]["first"]


def test_a_second_loss_while_the_epoch_forms_begins_another_and_both_are_named():
    members = Membership(size=3)
    join_all(members, 0)
    members.handle(lost(1), 2.0)
    assert join_all(members, 1, ranks=[0, 2]) == []
    assert members.handle(lost(2), 2.1) == [{"kind": "fence", "epoch": 2}]
    (form,) = join_all(members, 2)
    assert form["epoch"] == 2 and [each["rank"] for each in form["lost"]] == [1, 2]


def test_a_broken_connection_waits_for_the_word_of_a_death_and_then_counts_by_itself():
    broken = {"kind": "broken", "rank": 0, "epoch": 0, "error": "connection closed"}
    members = Membership(size=2)
    join_all(members, 0)
    assert members.handle(broken, 2.0) == [] == members.tick(2.0 + BROKEN_GRACE_S / 2)
    members.handle(lost(1), 2.01)
    assert members.epoch == 1 and members.tick(3.0) == []  # one epoch for both

    alone = Membership(size=2)
    join_all(alone, 0)
    alone.handle(broken, 2.0)
    assert alone.tick(2.0 + BROKEN_GRACE_S) == [{"kind": "fence", "epoch": 1}]
    assert alone.handle(broken, 3.0) == [] == alone.tick(9.0)  # of an epoch that is over


def test_a_rank_that_fails_again_and_again_without_a_new_step_ends_the_job_with_65():
    members = Membership(size=2, limits=Limits(failures=2))
    join_all(members, 0)
    for epoch in (1, 2):
        assert members.handle(lost(1, "failed (KeyError: 'x')"), epoch)[0]["kind"] == "fence"
        join_all(members, epoch)
    (verdict,) = members.handle(lost(1, "failed (KeyError: 'x')"), 3.0)
    assert verdict["exit_code"] == NO_PROGRESS and verdict["rank"] == 1
    assert "KeyError" in verdict["error"] and "recovery.max_failures" in verdict["error"]
    assert members.handle(lost(0), 4.0) == []  # it is over


def test_a_new_step_forgives_earlier_failures():
    members = Membership(size=2, limits=Limits(failures=1))
    for epoch in range(4):
        join_all(members, epoch)
        members.handle({"kind": "beats", **NODE, "ranks": [[0, epoch, 5], [1, epoch, 4]]}, epoch)
        assert members.handle(lost(1), epoch)[0]["kind"] == "fence"


def test_the_job_is_over_when_all_have_ended_and_not_before():
    members = Membership(size=2)
    join_all(members, 0)
    assert members.handle({"kind": "ended", "rank": 0, "exit_code": DONE}, 1.0) == []
    assert members.handle(lost(1), 1.1)[0]["kind"] == "fence"  # rank 0 must join again
    join_all(members, 1)
    assert members.handle({"kind": "ended", "rank": 1, "exit_code": DONE}, 2.0) == []
    (verdict,) = members.handle({"kind": "ended", "rank": 0, "exit_code": DONE}, 2.1)
    assert verdict["exit_code"] == DONE


def test_one_bad_end_is_the_jobs_end_even_if_the_others_hang():
    members = Membership(size=2)
    join_all(members, 0)
    end = {"kind": "ended", "rank": 1, "exit_code": 2, "error": "a token outside the vocabulary"}
    assert members.handle(end, 1.0) == [] == members.tick(1.0 + ENDED_GRACE_S / 2)
    (verdict,) = members.tick(1.0 + ENDED_GRACE_S)
    assert verdict == {
        "kind": "verdict",
        "exit_code": 2,
        "rank": 1,
        "error": "a token outside the vocabulary",
        "restart": None,
    }


def test_a_stop_of_all_ranks_is_a_requeue():
    members = Membership(size=2)
    join_all(members, 0)
    members.handle({"kind": "ended", "rank": 0, "exit_code": REQUEUE}, 1.0)
    (verdict,) = members.handle({"kind": "ended", "rank": 1, "exit_code": REQUEUE}, 1.0)
    assert verdict["exit_code"] == REQUEUE


def test_a_stop_that_a_loss_comes_between_does_not_end_the_recovered_run():
    members = Membership(size=2)
    join_all(members, 0)
    members.handle({"kind": "ended", "rank": 0, "exit_code": REQUEUE}, 1.0)
    members.handle(lost(1), 1.1)
    join_all(members, 1, now=1.2)
    assert members.tick(2.0 + ENDED_GRACE_S) == []


def test_a_word_of_an_epoch_that_is_over_does_not_say_that_the_run_has_begun():
    members = Membership(size=2)
    join_all(members, 0)
    members.handle(lost(1), 1.1)
    for rank in (0, 1):
        members.handle({"kind": "running", "rank": rank, "epoch": 0}, 1.2)
    (form,) = join_all(members, 1)
    assert form["first"]


def test_an_end_of_an_epoch_that_is_over_does_not_count():
    members = Membership(size=2)
    join_all(members, 0)
    members.handle(lost(1), 1.0)
    members.handle({"kind": "ended", "rank": 0, "epoch": 0, "exit_code": DONE}, 1.1)  # on its way meanwhile
    join_all(members, 1)
    assert members.handle({"kind": "ended", "rank": 1, "epoch": 1, "exit_code": DONE}, 2.0) == []
    (verdict,) = members.handle({"kind": "ended", "rank": 0, "epoch": 1, "exit_code": DONE}, 2.1)
    assert verdict["exit_code"] == DONE


def test_a_rank_that_does_not_join_is_killed_and_one_that_comes_late_has_its_time():
    members = Membership(size=3, limits=Limits(hang_s=10.0))
    assert ticks(members, 100, 108) == []
    join_all(members, 0, now=109.0, ranks=[0, 2])
    assert ticks(members, 109, 409) == []
    (kill,) = ticks(members, 410, 500)
    assert (kill["kind"], kill["rank"]) == ("kill", 1)


def test_a_replacement_that_makes_no_first_step_is_the_one_furthest_behind():
    members = Membership(size=2, limits=Limits(hang_s=10.0))
    join_all(members, 0, now=1.0)
    beats = {"kind": "beats", **NODE, "ranks": [[0, -1, 3], [1, -1, 4]]}
    members.handle(beats, 1.0)
    assert ticks(members, 2, 15) == []  # documents are being prepared
    for rank in (0, 1):
        members.handle({"kind": "running", "rank": rank, "epoch": 0}, 15.0)
    members.handle(lost(1), 16.0)
    join_all(members, 1, now=17.0)
    members.handle({"kind": "beats", **NODE, "ranks": [[0, 7, 90], [1, -1, 2]]}, 18.0)
    (kill,) = ticks(members, 17, 29)
    assert (kill["kind"], kill["rank"]) == ("kill", 1)


def test_without_progress_the_rank_furthest_behind_is_killed():
    members = Membership(size=3, limits=Limits(hang_s=10.0))
    join_all(members, 0)
    members.handle({"kind": "beats", **NODE, "ranks": [[0, 4, 90], [1, 4, 88], [2, 4, 91]]}, 1.0)
    members.handle({"kind": "beats", **NODE, "ranks": [[0, 4, 90], [1, 4, 88], [2, 4, 92]]}, 6.0)
    assert members.tick(15.0) == []
    (kill,) = members.tick(16.5)
    assert (kill["kind"], kill["rank"]) == ("kill", 1) and "10 s" in kill["why"]


def test_a_lost_node_is_left_to_torchrun():
    members = Membership(size=2)
    (verdict,) = members.handle({"kind": "node_lost", "node": 1, "first_rank": 1}, 1.0)
    assert verdict["exit_code"] == FAILED and "node 1" in verdict["error"] and verdict["restart"]


def test_broken_connections_before_each_death_do_not_blame_their_reporter():
    members = Membership(size=2, limits=Limits(failures=1))
    said = []
    for epoch in (0, 2):
        join_all(members, epoch, now=float(epoch))
        broken = {"kind": "broken", "rank": 0, "epoch": epoch, "error": "connection closed"}
        members.handle(broken, float(epoch))
        assert members.tick(epoch + 1.0) == [{"kind": "fence", "epoch": epoch + 1}]
        said = members.handle(lost(1, "failed (KeyError)"), epoch + 1.1)
    assert said[0]["kind"] == "verdict" and "rank 1 failed 2 times" in said[0]["error"]


def test_connections_that_break_again_and_again_end_the_job_too():
    members = Membership(size=2, limits=Limits(failures=1))
    said = []
    for epoch in range(4):
        join_all(members, epoch)
        members.handle({"kind": "broken", "rank": 0, "epoch": epoch, "error": "reset"}, epoch)
        said = members.tick(epoch + 0.9)
    assert said[0]["kind"] == "verdict" and "connections of rank 0 failed 4 times" in said[0]["error"]


def test_a_node_whose_supervisor_is_silent_ends_the_attempt():
    members = Membership(size=2)
    other = {"kind": "beats", "ranks": [], "node": 1, "first_rank": 1}
    for now in (1.0, 10.0):
        assert members.handle({"kind": "beats", "ranks": [], **NODE}, now) == []
    members.handle(other, 1.0)
    assert members.tick(1.0 + SILENCE_S) == []
    (verdict,) = members.tick(1.1 + SILENCE_S)
    assert verdict["exit_code"] == FAILED and verdict["restart"] and verdict["rank"] == 1
    assert "node 1" in verdict["error"] and "silent" in verdict["error"]
    assert members.tick(2.0 + SILENCE_S) == []  # once


def test_a_watcher_that_was_asleep_judges_nobody_by_that_time():
    members = Membership(size=2, limits=Limits(hang_s=20.0))
    join_all(members, 0)
    for node in (0, 1):
        beats = {"kind": "beats", "node": node, "first_rank": node, "ranks": [[node, 1, 1]]}
        assert members.handle(beats, 1.0) == []
    assert members.tick(1.0) == []
    for now in range(100, 118):  # 99 s asleep, then 18 s awake
        assert members.tick(float(now)) == []
    said = [message for now in range(118, 150) for message in members.tick(float(now))]
    assert [message["kind"] for message in said] == ["kill", "verdict"]
