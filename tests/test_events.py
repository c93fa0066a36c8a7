from ecomoe.ecology.events import Event, detect
from ecomoe.ecology.taxonomy import Thresholds


def record(step, counts, *, phase="eval", name="moe"):
    usage = [count / sum(counts) for count in counts]
    dead = sum(share < 0.01 for share in usage)
    layer = {
        "name": name,
        "num_experts": len(counts),
        "counts": {"top1": counts, "topk": counts},
        "dead": {"top1": dead, "topk": dead},
    }
    return {"step": step, "phase": phase, "layers": [layer]}


def run(*histories, thresholds=None):
    memory, events = {}, []
    for step, counts in enumerate(histories):
        found, memory = detect(memory, record(step, counts), thresholds=thresholds or Thresholds())
        events += [(e.kind, e.step, e.expert) for e in found if e.basis == "top1"]
    return events


ALIVE, DEAD = [5000, 5000, 5000], [0, 7500, 7500]


def test_death_and_revival():
    assert run(ALIVE, DEAD, DEAD, ALIVE, ALIVE) == [("death", 1, 0), ("revival", 3, 0)]


def test_dead_from_the_start_and_revived():
    assert run(DEAD, ALIVE) == [("death", 0, 0), ("revival", 1, 0)]


def test_few_tokens_are_no_evidence():
    assert run([0, 50, 50]) == []


def test_evidence_is_pooled_over_reports():
    assert run(*[[0, 400, 400]] * 3) == [("death", 1, 0)]


def test_a_crossing_back_starts_the_evidence_anew():
    few = [0, 400, 400]
    assert run(few, [30, 400, 400], few, [30, 400, 400], few) == []


def test_just_above_the_bound_is_no_revival():
    assert run(DEAD, [1100 * 10, 500_000, 489_000]) == [("death", 0, 0)]


def test_phases_and_layers_are_apart():
    memory = {}
    for made in (record(0, ALIVE), record(1, DEAD, phase="train"), record(1, DEAD, name="b")):
        events, memory = detect(memory, made, thresholds=Thresholds())
    assert {(e.phase, e.layer) for e in events} == {("eval", "b")}


def test_detect_leaves_its_memory_alone():
    _, memory = detect({}, record(0, ALIVE), thresholds=Thresholds())
    kept = repr(memory)
    detect(memory, record(1, DEAD), thresholds=Thresholds())
    assert repr(memory) == kept


def test_event_tells_where_why_and_what_to_do():
    _, memory = detect({}, record(0, ALIVE), thresholds=Thresholds())
    (event, _), memory = detect(memory, record(7, DEAD), thresholds=Thresholds())
    assert event.evidence["tokens"] == 15_000
    assert event.advice
    assert str(event).startswith("7 eval moe expert 0 top1: death (usage 0, interval [0, ")
    assert Event(**event.to_dict()) == event
    (event, _), _ = detect(memory, record(27, ALIVE), thresholds=Thresholds())
    assert event.evidence["steps_dead"] == 20
