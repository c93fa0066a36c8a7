import json

import pytest

from ecomoe.ecology.sinks import JsonlSink, read_records

RECORDS = [{"step": step, "text": "é"} for step in range(4)]


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
    sink = JsonlSink(path)
    for record in RECORDS:
        sink.write(record)
    sink.rewind(2)
    sink.write(RECORDS[3])
    assert list(read_records(path)) == [RECORDS[0], RECORDS[1], RECORDS[3]]


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("no json\n" + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not JSON; .* give another file"):
        list(read_records(path))
