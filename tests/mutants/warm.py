"""A process that has imported the libraries and runs pytest in forks of itself. See `mutation.py`.

Most of what a short test costs is the import of JAX, torch and the like. This process pays for it
once. It has imported neither the tested package nor a test: each fork finds them as they are then.

A line of standard input is a request, {"arguments": of pytest, "output": file}. The answer is two
lines: {"pid": N} of the fork, which leads a process group of its own, and {"code": its exit code}.
"""

import gc
import importlib
import json
import os
import pathlib
import runpy
import sys
import warnings


def main(libraries: list[str]) -> None:
    conftest = pathlib.Path("tests/conftest.py")
    if conftest.exists():
        runpy.run_path(str(conftest))  # JAX reads some of the environment when it is imported.
    for name in libraries:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # A test that needs it will say so.
    gc.collect()
    gc.freeze()
    # No fork before here has started JAX's threads, which is what the warning is about.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _test(request["arguments"], request["output"])
        os.setpgid(pid, pid)  # Here too, so that the group is there when its number is told.
        _answer(pid=pid)
        _, status = os.waitpid(pid, 0)
        _answer(code=os.waitstatus_to_exitcode(status))


def _test(arguments: list[str], output: str) -> None:
    """Does not return: what is registered for the end of the first process is not for this one."""
    code = 70  # EX_SOFTWARE
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        warnings.resetwarnings()
        sys.argv = ["pytest", *arguments]
        import pytest

        code = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _answer(**fields: int) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
