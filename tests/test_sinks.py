import json

import pytest

from ecomoe.ecology.sinks import JsonlSink, read_records

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
        whole = content[:kept].count(b"\n")
        assert list(read_records(path)) == RECORDS[:whole]
        write(path, RECORDS[whole:])
        assert path.read_bytes() == content


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


@pytest.mark.parametrize("content", [b'{"a":1}', b'{"a":1}\n', b"\x00", b'{"step": 1, "loss": 2}'])
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
    assert JsonlSink(path).start == len(content) // 2


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("no json\n" + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not JSON; .* give another file"):
        list(read_records(path))
