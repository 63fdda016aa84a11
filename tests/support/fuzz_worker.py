"""Reads damaged files, one after the other, in a process that may die of it.

    python fuzz_worker.py FOLDER DOOR:FIRST:COUNT ...

Writes a line of JSON before and after each case. A case that takes too long ends the process with
the traces of its threads; one that takes too much memory ends in a MemoryError.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import random
import re
import resource
import shutil
import sys
import time

import fuzz_mutations
import fuzz_readers

PATIENCE = 300  # seconds of a case, on a machine that is busy
MAX_BYTES = 2 << 30  # that a process may grow by; the files have 100 KB


def run_case(good: pathlib.Path, door: str, number: int) -> dict[str, object]:
    """What came of one damaged copy of a good folder."""
    folder = good.with_name(f"case-{door}-{number}")
    shutil.copytree(good, folder, copy_function=os.link)
    what = fuzz_mutations.mutate_folder(folder, random.Random(f"{door}-{number}"))
    tell({"case": f"{door}-{number}", "what": what})
    start, found = time.process_time(), {"outcome": "read"}
    try:
        fuzz_readers.DOORS[door].read(folder)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        found = {"outcome": "refused", "line": line, "blamed": str(folder) in line}
    except BaseException as error:  # what this is about: to be told, with its kind
        found = {"outcome": "fault", "line": f"{type(error).__name__}: {error}"[:2000]}
        if os.environ.get("FUZZ_TRACE"):
            raise
    finally:
        shutil.rmtree(folder)
    return found | {"seconds": time.process_time() - start}


def tell(record: dict[str, object]) -> None:
    print(json.dumps(record), flush=True)


def main() -> None:
    root = pathlib.Path(sys.argv[1])
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
    for argument in sys.argv[2:]:
        door, first, count = argument.split(":")
        for number in range(int(first), int(first) + int(count)):
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            tell(run_case(root / door, door, number))
    faulthandler.cancel_dump_traceback_later()
    tell({"peak": peak_bytes()})


def peak_bytes() -> int:
    """The most memory that this program had; ru_maxrss also counts that of the one that forked."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


if __name__ == "__main__":
    main()
