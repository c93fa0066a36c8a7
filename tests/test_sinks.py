import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from ecomoe.ecology.sinks import Follower, JsonlSink, read_records, read_runs

RECORDS = [{"step": step, "phase": "train", "text": "é"} for step in range(4)]


def write(path, records):
    sink = JsonlSink(path)
    for record in records:
        sink.write(record)


def test_records_come_back(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    write(path, RECORDS[:2])
    write(path, RECORDS[2:])
    assert list(read_records(path)) == RECORDS


def test_killed_at_any_byte(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, RECORDS)
    content = path.read_bytes()
    for kept in range(len(content) + 1):
        path.write_bytes(content[:kept])
        whole = max(0, content[:kept].count(b"\n") - 1)  # the first line is the run's
        assert list(read_records(path)) == RECORDS[:whole]
        write(path, RECORDS[whole:])
        assert list(read_records(path)) == RECORDS
        sizes = [len(run.records) for run in read_runs(path)]
        assert sizes == [n for n in (whole, len(RECORDS) - whole) if n]


def test_runs_are_kept_apart(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(
        json.dumps(RECORDS[0], separators=(",", ":")) + "\n"
    )  # before runs had a line of their own
    sinks = [JsonlSink(path)]
    sinks[0].write(RECORDS[1])
    JsonlSink(path)  # writes nothing, so leaves no trace
    sinks.append(JsonlSink(path))
    sinks[1].write(RECORDS[2])
    runs = read_runs(path)
    assert [run.id for run in runs] == ["", *(sink.run for sink in sinks)]
    assert [run.records for run in runs] == [RECORDS[:1], RECORDS[1:2], RECORDS[2:3]]
    assert [bool(run.started) for run in runs] == [False, True, True]


def test_resumed_run_continues_its_own(tmp_path):
    path = tmp_path / "run.jsonl"
    sink = JsonlSink(path)
    states = [sink.state_dict()]
    for record in RECORDS[:3]:
        sink.write(record)
        states.append(sink.state_dict())
    for number, state in reversed(list(enumerate(states))):
        again = JsonlSink(path)
        assert again.rewind(state)
        again.write(RECORDS[3])
        (run,) = read_runs(path)
        assert run.id == sink.run
        assert run.records == [*RECORDS[:number], RECORDS[3]]


@pytest.mark.parametrize("num", [0, 2])
def test_resuming_spares_the_runs_that_follow(tmp_path, num):
    path = tmp_path / "run.jsonl"
    write(path, RECORDS[:1])
    sink = JsonlSink(path)
    for record in RECORDS[:num]:
        sink.write(record)
    state = sink.state_dict()
    sink.write(RECORDS[3])
    write(path, RECORDS[1:2])
    again = JsonlSink(path)
    assert again.rewind(state)
    assert list(again.records()) == RECORDS[:num]
    again.write(RECORDS[2])
    assert list(again.records()) == RECORDS[:num] + RECORDS[2:3]
    runs = read_runs(path)
    assert [run.records for run in runs] == [
        RECORDS[:1],
        RECORDS[1:2],
        [*RECORDS[:num], RECORDS[2]],
    ]
    assert runs[-1].id == sink.run


@pytest.fixture
def full_disk():
    """Return a function that lets files grow to so many bytes, or without a bound."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit()


def test_full_disk_loses_no_record(tmp_path, full_disk):
    path = tmp_path / "run.jsonl"
    sink = JsonlSink(path)
    sink.write(RECORDS[0])
    whole = path.read_bytes()
    full_disk(len(whole) + 20)
    for record in RECORDS[1:3]:
        with pytest.raises(OSError, match="File too large"):
            sink.write(record)
        assert path.read_bytes() == whole  # no torn line stays
    full_disk()
    sink.write(RECORDS[3])
    assert list(read_records(path)) == RECORDS
    sink.close()


def test_what_waits_is_written_at_the_end(tmp_path, full_disk):
    sink = JsonlSink(tmp_path / "run.jsonl")
    full_disk(20)
    with pytest.raises(OSError, match="File too large"):
        sink.write(RECORDS[0])
    with pytest.warns(UserWarning, match="lacks 1 records of this run.*File too large"):
        sink.close()
    full_disk()
    sink.write(RECORDS[1])
    assert list(sink.records()) == RECORDS[:2]


def test_waiting_records_are_bounded(tmp_path, monkeypatch, full_disk):
    monkeypatch.setattr("ecomoe.ecology.sinks.MAX_WAITING_BYTES", 100)
    sink = JsonlSink(tmp_path / "run.jsonl")
    full_disk(0)
    for record in RECORDS:
        with pytest.raises(OSError, match="File too large"):
            sink.write(record)
    full_disk()
    with pytest.warns(UserWarning, match="lacks 2 records"):
        sink.close()
    assert list(sink.records()) == RECORDS[2:]


def test_removed_file_begins_anew(tmp_path):
    sink = JsonlSink(tmp_path / "deep" / "run.jsonl")
    sink.write(RECORDS[0])
    shutil.rmtree(tmp_path / "deep")
    with pytest.raises(FileNotFoundError):
        sink.write(RECORDS[1])
    (tmp_path / "deep").mkdir()
    sink.write(RECORDS[2])
    (run,) = read_runs(sink.path)
    assert (run.id, run.records) == (sink.run, RECORDS[1:3])


def test_nan_is_left_out(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.write(RECORDS[0] | {"loss": float("nan")})
    sink.write(RECORDS[0])
    assert list(sink.records()) == RECORDS[:1]


def test_following(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    write(sink.path, RECORDS[:1])
    follower = Follower(sink.path)
    assert [entry.get("step", "run") for entry in follower.read()] == ["run", 0]
    sink.write(RECORDS[1])
    state = sink.state_dict()
    sink.write(RECORDS[2])
    with sink.path.open("ab") as file:
        file.write(b'{"step":')
    assert [entry.get("step", "run") for entry in follower.read()] == ["run", 1, 2]
    again = JsonlSink(sink.path)
    assert again.rewind(state)
    assert follower.read() == []
    again.write(RECORDS[3])
    assert follower.read() == RECORDS[3:]
    assert follower.read() == []


def test_each_record_is_flushed(tmp_path):
    path = tmp_path / "run.jsonl"
    sink = JsonlSink(path)
    sink.write(RECORDS[0])
    assert list(read_records(path)) == RECORDS[:1]


def test_rewinding(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, RECORDS[:2])
    sink = JsonlSink(path)
    sink.write(RECORDS[2])
    state = sink.state_dict()
    sink.write(RECORDS[0])
    again = JsonlSink(path)
    assert again.rewind(state)
    again.write(RECORDS[3])
    assert list(read_records(path)) == RECORDS
    assert list(again.records()) == RECORDS[2:]


def test_another_file_is_not_rewound(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink.write(RECORDS[0])
    write(tmp_path / "other.jsonl", RECORDS[1:])
    other = JsonlSink(tmp_path / "other.jsonl")
    assert not other.rewind(sink.state_dict())
    assert list(read_records(other.path)) == RECORDS[1:]


@pytest.mark.parametrize(
    "content", [b'{"a":1}', b'{"ru":', b'{"a":1}\n', b"\x00", b'{"step": 1, "loss": 2}']
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must hold records of ecomoe\.Monitor alone"):
        JsonlSink(path)
    assert path.read_bytes() == content


def test_only_the_tail_is_read(tmp_path):
    path = tmp_path / "run.jsonl"
    record = RECORDS[0] | {"text": "x" * 200_000}
    write(path, [record, record])
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert JsonlSink(path).start == content.index(b"\n", content.index(b"\n") + 1) + 1


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("no json\n" + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not JSON; .* give another file"):
        list(read_records(path))


def test_json_of_something_else_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no record; .* give another file"):
        list(read_records(path))


@pytest.mark.parametrize("torn", [False, True])
def test_two_runs_that_write_at_once_are_kept_apart(tmp_path, torn):
    path = tmp_path / "run.jsonl"
    first, second = JsonlSink(path), JsonlSink(path)
    for number, record in enumerate(RECORDS):
        (first, second)[number % 2].write(record)
        if torn and number == 1:
            with path.open("ab") as file:
                file.write(b'{"step":9,')
    expected = {first.run: RECORDS[::2], second.run: RECORDS[1::2]}
    assert {run.id: run.records for run in read_runs(path)} == expected
    assert [list(sink.records()) for sink in (first, second)] == list(expected.values())


def test_a_run_resumes_where_another_wrote_in_between(tmp_path):
    path = tmp_path / "run.jsonl"
    first, second = JsonlSink(path), JsonlSink(path)
    first.write(RECORDS[0])
    second.write(RECORDS[1])
    first.write(RECORDS[2])
    state = first.state_dict()
    first.write(RECORDS[1])
    second.write(RECORDS[3])
    again = JsonlSink(path)
    assert again.rewind(state)
    again.write(RECORDS[3])
    expected = {second.run: [RECORDS[1], RECORDS[3]], first.run: [*RECORDS[::2], RECORDS[3]]}
    assert {run.id: run.records for run in read_runs(path)} == expected
    assert list(again.records()) == expected[first.run]


WRITER = """
import json, sys
from ecomoe.ecology.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
for line in sys.stdin:
    sink.write(json.loads(line))
    print(json.dumps(sink.state_dict()), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_run_that_another_process_is_writing_is_left_to_it(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, RECORDS[:1])
    other = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin is not None
    assert other.stdout is not None

    def let_it_write(record):
        print(json.dumps(record), file=other.stdin, flush=True)
        return json.loads(other.stdout.readline())

    try:
        state = let_it_write(RECORDS[1])
        let_it_write(RECORDS[2])
        again = JsonlSink(path)
        with pytest.warns(UserWarning, match="another process is still writing run"):
            assert again.rewind(state)
        again.write(RECORDS[3])
        let_it_write(RECORDS[0])
        *_, theirs, ours = sorted(read_runs(path), key=lambda run: run.id == again.run)
        assert theirs.records == [RECORDS[1], RECORDS[2], RECORDS[0]]
        assert ours.records == [RECORDS[1], RECORDS[3]] == list(again.records())
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    after = JsonlSink(path)
    assert after.rewind(state)  # it was killed, and its lock with it
    after.write(RECORDS[3])
    (found,) = [run for run in read_runs(path) if run.id == state["run"]]
    assert found.records == [RECORDS[1], RECORDS[3]]


def test_closing_leaves_nothing_open(tmp_path):
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink.write(RECORDS[0])
    sink.close()
    write(tmp_path / "run.jsonl", RECORDS)  # its sink is forgotten without being closed
    after = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    assert after == before
