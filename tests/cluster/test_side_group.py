"""Groups beside the learners' own: over a file on one machine and over TCP between hosts, and no one waits for ever."""

import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from cluster import side_group
from cluster.side_group import GroupLostError, Invitation, Meeting, SideGroup


@pytest.fixture(params=[1, 2])
def hosts(request, monkeypatch):
    monkeypatch.setattr(side_group, "num_hosts", lambda: request.param)
    monkeypatch.setattr(side_group.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    return request.param


def in_threads(function, invitations) -> tuple[list[threading.Thread], list]:
    answers = []

    def run(invitation: Invitation) -> None:
        try:
            answers.append(function(invitation))
        except GroupLostError as error:
            answers.append(error)

    threads = [threading.Thread(target=run, args=(invitation,), daemon=True) for invitation in invitations]
    for thread in threads:
        thread.start()
    return threads, answers


def take_two(invitation: Invitation) -> torch.Tensor:
    group = invitation.accept()
    tensors = [torch.zeros(1_000), torch.zeros(3)]
    for tensor in tensors:
        group.broadcast(tensor)
    return torch.cat(tensors)


def test_all_get_what_one_sends(hosts):
    meeting = Meeting(2, nccl=False, timeout_s=20)
    kind = "file" if hosts == 1 else "tcp"
    assert {invitation.rendezvous.split("://")[0] for invitation in meeting.invitations} == {kind}
    threads, answers = in_threads(take_two, meeting.invitations)
    calls = []
    group = meeting.meet(lambda: calls.append(1))
    sent = torch.arange(1_003, dtype=torch.float32) / 7
    for part in sent.split((1_000, 3)):
        group.broadcast(part, lambda: calls.append(1))
    for thread in threads:
        thread.join(20)
    assert len(answers) == 2 and all(torch.equal(answer, sent) for answer in answers) and calls


def test_a_sender_that_gives_up_tells_those_who_came(hosts):
    meeting = Meeting(2, nccl=False, timeout_s=20)
    threads, answers = in_threads(Invitation.accept, meeting.invitations[:1])
    begun, asked = time.monotonic(), []

    def meanwhile() -> None:
        asked.append(1)
        if len(asked) > 20:
            raise GroupLostError("one has died")

    with pytest.raises(GroupLostError, match="one has died"):
        meeting.meet(meanwhile)
    threads[0].join(20)
    assert "given up" in str(answers[0]) and time.monotonic() - begun < 10


def test_who_does_not_come_or_take_part_in_time_ends_the_wait(hosts):
    late = Meeting(2, nccl=False, timeout_s=0.3)
    with pytest.raises(GroupLostError, match="did not answer in time"):
        late.meet(lambda: None)
    meeting = Meeting(1, nccl=False, timeout_s=0.5)
    threads, answers = in_threads(Invitation.accept, meeting.invitations)
    group = meeting.meet(lambda: None)
    threads[0].join(20)
    assert isinstance(answers[0], SideGroup)
    with pytest.raises(GroupLostError):
        group.broadcast(torch.zeros(1_000_000))


def test_an_invitation_of_a_sender_that_is_gone_is_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    gone = Invitation(rendezvous=place, rank=1, size=2, nccl=False, timeout_s=1)
    with pytest.raises(GroupLostError):
        gone.accept()


def test_the_watchdog_of_nccl_leaves_a_lost_group_to_us_and_other_groups_as_they_are(monkeypatch):
    """The names are those that torch 2.12 reads where it makes a group; a machine with NCCL is needed to see more."""
    handled = "TORCH_NCCL_ASYNC_ERROR_HANDLING"

    class Nccl(SimpleNamespace):
        Options = SimpleNamespace

        def __init__(self, store, rank, size, options):
            super().__init__(place=(rank, size), waits_s=options._timeout.total_seconds())
            self.handling = os.environ[handled]

    monkeypatch.setattr(side_group.dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv(handled, "3")
    seat = Invitation(rendezvous="file:///nowhere", rank=1, size=3, nccl=True, timeout_s=5)
    group = SideGroup(None, seat)
    made = group._group
    assert (made.place, made.waits_s, made.handling) == ((1, 3), 10, "0")
    assert os.environ[handled] == "3" and group.device.type == "cuda"
