"""launch/libtpu_flags.sh: flags that the TPU library knows, in groups that go together."""

import importlib.util
import itertools
import mmap
import pathlib

import pytest
from launch_stubs import Stubs

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
GROUPS = ("collectives", "all_to_all", "vmem", "host_offload", "several_slices")
# What tpu7x does on SparseCores by itself, and the memory that its cores do not have.
NOT_FOR = {"tpu7x": {"collectives", "vmem"}}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Stubs:
    return Stubs(tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="module")
def listed(stubs: Stubs) -> dict[tuple[str, str], list[str]]:
    result = stubs.run("libtpu_flags.sh", "--list")
    assert result.status == 0, result.err
    rows = (line.split(": ") for line in result.out.splitlines())
    return {tuple(names.split(" ")): flags.split(" ") for names, flags in rows}


def test_every_chip_has_its_groups_and_none_is_empty(listed):
    expected = {(c, g) for c in CHIPS for g in GROUPS if g not in NOT_FOR.get(c, set())}
    assert set(listed) == expected
    assert all(flag.startswith("--xla_") and "=" in flag for f in listed.values() for flag in f)


@pytest.mark.parametrize("chip", CHIPS)
def test_all_groups_of_a_chip_together_have_no_flag_twice(stubs, listed, chip):
    groups = [group for other, group in listed if other == chip]
    result = stubs.run("libtpu_flags.sh", chip, *groups)
    names = [flag.partition("=")[0] for flag in result.out.split()]
    assert len(names) == len(set(names))
    assert result.out.split() == list(itertools.chain(*(listed[chip, group] for group in groups)))


def test_a_group_named_twice_counts_once(stubs):
    once = stubs.run("libtpu_flags.sh", "v6e", "vmem").out
    assert once == "--xla_tpu_scoped_vmem_limit_kib=98304\n"
    assert stubs.run("libtpu_flags.sh", "v6e", "vmem", "vmem").out == once
    assert stubs.run("libtpu_flags.sh", "v6e").out == "\n"
    assert stubs.run("libtpu_flags.sh", "--dry-run", "v6e", "vmem").out == once


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux")
def test_the_library_knows_every_flag(listed):
    """It ends the program at the start of a run where it does not."""
    library = pathlib.Path(importlib.util.find_spec("libtpu").origin).with_name("libtpu.so")
    names = {f.partition("=")[0].removeprefix("--") for flags in listed.values() for f in flags}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        unknown = [name for name in sorted(names) if data.find(f"\0{name}\0".encode()) < 0]
    assert not unknown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CHIP: missing; allowed: v5e, v5p, v6e, tpu7x"),
        (["v4"], "CHIP: got 'v4'; allowed: v5e"),
        (["v5e v5p"], "CHIP: got 'v5e v5p'"),
        (["v6e", "speed"], "GROUP: got 'speed'; allowed: collectives"),
        (["v6e", "vmem", ""], "GROUP: got ''"),
        (["tpu7x", "collectives"], "GROUP: got collectives, which a tpu7x does not have"),
    ],
)
def test_unknown_words_are_refused(stubs, words, message):
    result = stubs.run("libtpu_flags.sh", *words)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
