"""Several processes: agreement, SIGTERM, SIGKILL and what cannot be, over loopback."""

import json
import re
import signal
import threading
from pathlib import Path

import killing
import pytest

from experiments import processes
from experiments.errors import CommonError, ExperimentError
from experiments.processes import Connection


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with two devices that nothing has interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    statuses, said = killing.start(directory, devices=2).end()
    assert statuses == [0], said
    return directory


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_processes_ended_on_the_way_train_to_the_same_bits(
    killed: bool, whole: Path, tmp_path: Path
) -> None:
    """Two, by SIGTERM to one; two, by SIGKILL to the coordinator; then one with two devices."""
    run = killing.start(tmp_path / "run", count=2)
    run.wait_for(4)
    run.processes[1].send_signal(signal.SIGTERM)
    statuses, said = run.end()
    assert statuses == [143, 143]
    assert f"ended by SIGTERM, with checkpoint {run.directory}" in said[0]
    assert "--resume continues" in said[0] and "--resume" not in said[1]

    if killed:
        run = killing.start(tmp_path / "run", "--resume", count=2)
        run.wait_for(30)
        run.processes[0].send_signal(signal.SIGKILL)
        statuses, _ = run.end(killing.ENDED_WITHIN)
        assert statuses[0] == -signal.SIGKILL and statuses[1] not in (0, -signal.SIGKILL)
    assert not (run.directory / "results.json").exists()

    statuses, said = killing.start(tmp_path / "run", "--resume", devices=2).end()
    assert statuses == [0], said
    assert killing.digest(run.directory) == killing.digest(whole)
    results = json.loads((run.directory / "results.json").read_text())
    assert (results["mesh"], results["processes"]) == ("data=2", 1)
    losses = [
        [record["loss"] for record in json.loads(path.read_text())["history"]["qat"]]
        for path in (run.directory / "results.json", whole / "results.json")
    ]
    assert losses[0] == losses[1]


@pytest.mark.nightly
def test_four_processes_that_are_killed_train_to_the_same_bits(tmp_path: Path) -> None:
    assert killing.start(tmp_path / "whole", count=4).end()[0] == [0] * 4
    run = killing.start(tmp_path / "run", count=4)
    run.wait_for(20)
    for process in run.processes:
        process.send_signal(signal.SIGKILL)
    run.end(killing.ENDED_WITHIN)
    assert killing.start(tmp_path / "run", "--resume", count=4).end()[0] == [0] * 4
    assert killing.digest(tmp_path / "run") == killing.digest(tmp_path / "whole")


def test_processes_that_differ_end_with_one_message(tmp_path: Path) -> None:
    run = killing.start(
        tmp_path / "run",
        count=2,
        own={1: ["--learning-rate", "0.5"]},
        environment={1: {"TINY_DATA": "3"}},
    )
    statuses, said = run.end()
    assert statuses == [1, 1]
    assert "learning_rate: 0.05 in process 0, 0.5 in process 1" in said[0]
    assert "contents of the data: " in said[0] and "error" not in said[1]
    assert not run.directory.exists()


def test_a_full_disk_on_one_host_ends_all(tmp_path: Path) -> None:
    run = killing.start(
        tmp_path / "run",
        "--mesh",
        "model=2",
        count=2,
        environment={1: {"TINY_FILE_LIMIT": "16"}},
    )
    statuses, said = run.end()
    assert statuses[1] == 1 and statuses[0] != 0
    (line,) = (line for line in said[1].splitlines() if line.startswith("error: "))
    assert "error: cannot write checkpoint" in line and "continue with --resume" in line
    assert not [path for path in (run.directory / "qat").glob("*") if path.name.isdigit()]


def test_a_coordinator_that_does_not_answer(tmp_path: Path) -> None:
    run = killing.start(tmp_path / "run", "--connect-timeout", "2", count=2)
    run.processes[0].kill()
    statuses, said = run.end()
    assert statuses[1] == 1
    assert "error: the coordinator 127.0.0.1:" in said[1]
    assert "does not answer within 2 s" in said[1] and len(said[1].splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not all processes that the cluster's environment names .* host can be reached"),
        ({"coordinator": "a:1", "count": 4, "index": 0}, "not all 4 processes came .* a:1 within"),
        ({"coordinator": "a:1", "count": 4, "index": 3}, "the coordinator a:1 does not answer"),
    ],
)
def test_who_has_not_come_in_time(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    told = []

    def end(said: str, status: int) -> None:
        told.append((said, status))
        ended.set()

    monkeypatch.setattr(processes, "_end", end)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: ended.wait(60))
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: None)
    with processes.connected(Connection(timeout=1, **options)):
        pass
    ((said, status),) = told
    assert status == 1 and re.match(f"error: {message}", said) and "--connect-timeout" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator, --num-processes and --process-id belong together"),
        ({"coordinator": "a", "count": 2, "index": 0}, "--coordinator must be HOST:PORT, got 'a'"),
        ({"coordinator": "a:1", "count": 0, "index": 0}, "--num-processes must be 1 or more"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "--process-id must be 0 to 1 .* got 2"),
        ({"timeout": 0}, "--connect-timeout must be 1 or more, got 0"),
    ],
)
def test_connections_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        Connection(**options)


def test_every_difference_is_told_but_no_more_than_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"seed": 0, "code": "b", **{f"f{i}": i for i in range(20)}}
    monkeypatch.setattr(processes, "exchange", lambda facts: [facts, other])
    with pytest.raises(CommonError) as error:
        processes.check_agreement({"seed": 1, "code": "a"})
    lines = str(error.value).splitlines()
    assert lines[1] == "  code: 'a' in process 0, 'b' in process 1"
    assert len(lines) == 13 and lines[11] == "  and 12 more"
    processes.check_agreement(other)


def test_what_one_process_meets_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ExperimentError("no such set")

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    for failures, message in (
        (["no such set", None], "^process 0: no such set$"),
        ([None, "no such set"], "^process 1: no such set$"),
        (["no such set", "no such set"], "^no such set$"),
    ):
        monkeypatch.setattr(processes, "exchange", lambda _, told=failures: told)
        with pytest.raises(CommonError, match=message):
            processes.together(refuse)
    monkeypatch.setattr(processes, "exchange", lambda told: [told, None])
    assert processes.together(lambda: 3) == 3
