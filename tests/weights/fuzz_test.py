"""Damaged files at every door: one line or a good read, in bounded time and memory.

Each case is a copy of a good folder with one file damaged, the same in every run. They are read in
a process of their own (tests/support/fuzz_worker.py), since a crash or a hang would end this one.
To repeat one: `fuzz_worker.py FOLDER DOOR:NUMBER:1`, with FUZZ_TRACE=1 for its trace.
"""

import collections
import json
import random
import subprocess
import sys

import fuzz_mutations
import fuzz_readers
import fuzz_worker
import pytest

CASES = 10_000
QUICK = 300
_SECONDS = 60  # of the processor, for any case; most need hundredths
_LINE = 6000  # characters
_SHARES = sum(door.share for door in fuzz_readers.DOORS.values())


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("doors")
    for name, door in fuzz_readers.DOORS.items():
        door.write(root / name)
        door.read(root / name)  # undamaged, it is read
    return root


def read_damaged(good, doors: dict[str, range]) -> list[dict]:
    """What came of the cases of each door, with "what" was damaged."""
    arguments = [f"{name}:{cases.start}:{len(cases)}" for name, cases in doors.items()]
    command = [sys.executable, fuzz_worker.__file__, str(good), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1]}\n{done.stderr[-4000:]}"
    assert not done.stderr  # the line of the error is the only one
    assert lines.pop()["peak"] < fuzz_worker.MAX_BYTES
    return [before | after for before, after in zip(lines[::2], lines[1::2], strict=True)]


def check(found: list[dict]) -> None:
    for case in found:
        assert case["outcome"] != "fault", case
        assert case["seconds"] < _SECONDS, case
        if case["outcome"] == "refused":
            assert case["blamed"], f"the file is not named: {case}"
            assert len(case["line"]) < _LINE, case
    outcomes = collections.defaultdict(collections.Counter)
    for case in found:
        outcomes[case["case"].partition("-")[0]][case["outcome"]] += 1
    for door, counts in outcomes.items():
        # Neither is every damage noticed (a value that changed a little), nor none.
        assert counts["refused"] >= 0.05 * counts.total(), (door, counts)


def shares(total: int) -> dict[str, int]:
    return {name: max(2, total * door.share // _SHARES)
            for name, door in fuzz_readers.DOORS.items()}  # fmt: skip


def test_some_damaged_files(good):
    check(read_damaged(good, {name: range(count) for name, count in shares(QUICK).items()}))


@pytest.mark.slow
@pytest.mark.parametrize("door", fuzz_readers.DOORS)
def test_ten_thousand_damaged_files(good, door):
    count = -(-CASES * fuzz_readers.DOORS[door].share // _SHARES)
    check(read_damaged(good, {door: range(count)}))


def test_damage_is_the_same_in_every_run(good, tmp_path):
    """And it is damage: nearly every case changes its file."""
    file = good / "single" / "config.json"
    data = file.read_bytes()
    texts = [fuzz_mutations.json_text(data, random.Random(str(n))) for n in range(50)]
    again = [fuzz_mutations.json_text(data, random.Random(str(n))) for n in range(50)]
    assert texts == again
    assert len(set(texts) - {data}) > 40
    archive = (good / "torch" / "model.pt").read_bytes()
    changed = {fuzz_mutations.torch_archive(archive, random.Random(str(n))) for n in range(50)}
    assert len(changed - {archive}) > 40


def test_a_fault_would_be_seen():
    """The check itself: what is neither a good read nor one line does not pass."""
    case = {
        "case": "x-0",
        "what": "",
        "outcome": "refused",
        "line": "a",
        "blamed": True,
        "seconds": 1,
    }
    check([case])
    for change in ({"outcome": "fault"}, {"blamed": False}, {"seconds": 61}, {"line": "a" * 9999}):
        with pytest.raises(AssertionError):
            check([case | change])
