"""A signal ends a process wherever it finds it, and what was half-made is undone.

Each program below gets SIGTERM at a moment at which Python drops what a handler raises, or a
library would catch it. That is why ours does not raise: a process that goes on after such a moment
prints "swallowed".
"""

import json
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from sage_grpo_jax.common import manifest

START = """
import contextlib, ctypes, gc, os, pathlib, signal, sys, threading, time
from sage_grpo_jax.common import folders, termination
termination.install()

def kill(*unused):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)  # the handler is called between two instructions

def swallowed():
    print("swallowed", flush=True)
"""

# Whoever runs the tests in the background may have told their processes to ignore some.
HEARD = """
import signal
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
"""

# What runs while a folder is half-written.
MOMENTS = {
    "plainly": "kill()",
    "a callback of the garbage collector": """
        gc.callbacks.append(lambda phase, info: kill())
        gc.collect()
    """,
    "a destructor": """
        class Thing:
            __del__ = kill
        Thing()
    """,
    "a callback from C": """
        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        def compare(a, b):
            kill()
            return 0
        ctypes.CDLL(None).qsort((ctypes.c_int * 2)(2, 1), 2, 4, compare)
    """,
    "a block that catches everything": """
        try:
            kill()
        except BaseException:
            pass
    """,
    "an except clause": """
        try:
            raise ValueError
        except ValueError:
            with contextlib.suppress(BaseException):
                kill()
    """,
    "the sum of an iterator in C": """
        with contextlib.suppress(BaseException):
            sum(iter(lambda: kill() or 1, 0))
    """,
    "a lock that nobody frees": """
        threading.Timer(0.2, kill).start()
        threading.Lock().acquire() and threading.Event().wait()
    """,
    "a call of C that does not come back": """
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    """,
    "another thread": """
        thread = threading.Thread(target=kill)
        thread.start()
        thread.join()
        time.sleep(30)
    """,
    "several signals at once": """
        for name in ("SIGTERM", "SIGHUP", "SIGTERM", "SIGINT"):
            signal.raise_signal(getattr(signal, name))
    """,
}


def run(program: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    """START and the program in a process of its own, which hears every signal."""
    return subprocess.run(
        [sys.executable, "-c", HEARD + START + textwrap.dedent(program), str(folder / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_half_written_folder_goes(moment, tmp_path):
    body = textwrap.indent(textwrap.dedent(MOMENTS[moment]), "    ")
    done = run(
        "with folders.new_folder(sys.argv[1], 'a test') as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        f"{body}\n"
        "    swallowed()\n",
        tmp_path,
    )
    assert done.stdout == ""
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr == "stopped: SIGTERM\n"
    assert list(tmp_path.iterdir()) == []


# Replaces a folder again and again, each time in a child that gets SIGTERM one call later.
REPLACEMENTS = """
import contextlib, json, os, pathlib, signal, sys, time
from sage_grpo_jax.common import folders, termination

def write(path, text, overwrite=False):
    with folders.new_folder(path, "a test", overwrite=overwrite) as folder:
        (folder / "a").write_text(text)

def replace(path, number):
    calls = 0

    def trace(frame, event, argument):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.endswith(("folders.py", "files.py")):
            calls += 1
            if calls == number:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGTERM)

    termination.install()
    sys.settrace(trace)
    write(path, "new", overwrite=True)
    sys.settrace(None)
    os._exit(0)

found = []
while not found or found[-1]["status"]:
    parent = pathlib.Path(sys.argv[1]) / str(len(found))
    write(parent / "out", "old")
    child = os.fork()
    if not child:
        replace(parent / "out", len(found) + 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = sorted(p.relative_to(parent).as_posix() for p in parent.rglob("*"))
    found.append({"status": status, "names": names, "text": (parent / "out/a").read_text()})
print(json.dumps(found))
"""


def test_at_every_step_of_a_replacement(tmp_path):
    """SIGTERM before the n-th call of a function while a folder of ours is replaced: the old one
    or the new one is there, whole, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", REPLACEMENTS, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    whole = ["out", "out/a", f"out/{manifest.FILE}"]
    assert [row["names"] for row in found] == [whole] * len(found)
    assert [row["status"] for row in found] == [143] * (len(found) - 1) + [0]
    texts = [row["text"] for row in found]
    change = texts.index("new")
    assert texts == ["old"] * change + ["new"] * (len(texts) - change)
    assert 10 < change < len(texts) - 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_status_is_that_of_the_signal(name, tmp_path):
    done = run(f"signal.raise_signal(signal.{name}); swallowed()", tmp_path)
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr == f"stopped: {name}\n"


def test_signals_that_are_ignored_stay_so(tmp_path):
    """As under nohup."""
    program = "signal.raise_signal(signal.SIGHUP); print('on')"
    done = subprocess.run(
        ["bash", "-c", 'trap "" HUP; exec "$@"', "-", sys.executable, "-c", START + program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_what_must_not_be_cut_in_two_is_finished_first(tmp_path):
    done = run(
        """
        with termination.on_stop(lambda: os.write(1, b"undone ")):
            with termination.uninterrupted():
                with termination.uninterrupted():
                    kill()
                os.write(1, b"finished ")
            swallowed()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (143, "finished undone ")


def test_an_error_in_such_a_block_does_not_lose_the_signal(tmp_path):
    done = run(
        """
        with contextlib.suppress(ValueError):
            with termination.uninterrupted():
                kill()
                raise ValueError
        swallowed()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (143, "")


def test_all_is_undone_the_last_first_and_in_spite_of_errors(tmp_path):
    done = run(
        """
        with contextlib.ExitStack() as stack:
            for name in (b"1", b"2", b"3"):
                stack.enter_context(termination.on_stop(lambda name=name: os.write(1, name)))
            stack.enter_context(termination.on_stop(lambda: 1 / 0))
            with termination.on_stop(lambda: os.write(1, b"over")):
                pass
            kill()
            swallowed()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (143, "321")
    assert done.stderr == "while stopping: division by zero\nstopped: SIGTERM\n"


def test_another_handler_takes_precedence_while_it_is_set(tmp_path):
    """An entry that saves and stops by itself."""
    done = run(
        """
        before = signal.signal(signal.SIGTERM, lambda *unused: print("saved", flush=True))
        kill()
        time.sleep(1.5)  # the other thread does not end it either
        signal.signal(signal.SIGTERM, before)
        print("on", flush=True)
        kill()
        swallowed()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (143, "saved\non\n")


def test_a_library_that_takes_the_signal(tmp_path):
    """Behind the back of Python, as jax.distributed does."""
    done = run(
        """
        termination.renew()
        ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))  # is ignored
        kill()
        print("on", flush=True)
        termination.renew()
        kill()
        swallowed()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (143, "on\n")


def test_without_install_nothing_is_taken(tmp_path):
    program = START.replace("termination.install()", "termination.renew()") + "kill(); swallowed()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"")


def test_a_child_neither_undoes_nor_ends_what_is_its_parents(tmp_path):
    done = run(
        """
        with folders.new_folder(sys.argv[1], "a test") as folder:
            child = os.fork()
            if not child:
                kill()
                time.sleep(30)
            print(os.waitpid(child, 0)[1])
            time.sleep(1.5)
            (folder / "a").write_text("whole")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, f"{signal.SIGTERM.value}\n"), done.stderr
    assert (tmp_path / "out" / "a").read_text() == "whole"


def test_a_child_that_is_a_program_of_its_own_has_the_usual_handlers(tmp_path):
    done = run(
        """
        import subprocess
        child = subprocess.Popen(["sleep", "30"])
        child.terminate()
        print(child.wait())
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM}\n")


def test_nobody_hears_the_last_line(tmp_path):
    """Standard error is a disk that is full."""
    with pathlib.Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", START + "kill(); swallowed()"],
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
        )
    assert (done.returncode, done.stdout) == (143, b"")


def test_tests_do_not_run_with_it():
    """Installed in this process it would end the test runner."""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
