"""How entries begin and end: flags, devices, signals, and what is wrong in one line.

0        done; `train` and `sweep` also where a signal stopped them and nothing is lost
1        the world failed (disk, reward service, numerics), or the program did (a trace)
2        the input is wrong; a rerun cannot help
128 + n  ended by signal n; what was half-made is removed
"""

from __future__ import annotations

import contextlib
import logging as std_logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from sage_grpo_jax.common import files, termination

DONE, FAILED, BAD_INPUT = 0, 1, 2

_REQUIRED = re.compile(r"Flag --([\w.]+) must have a value other than None")
# What bad input raises; ModuleNotFoundError: an optional dependency, or a module that was named.
_BAD_INPUT = (ValueError, OSError, ModuleNotFoundError)


def run(
    main: Callable[[], None],
    *,
    stopped: tuple[type[Exception], ...] = (),
    verbosity: int | None = logging.WARNING,
) -> NoReturn:
    """Parses the flags, calls `main` and exits; what every entry ends with.

    Bad flags, positional arguments, and ValueError, OSError and ModuleNotFoundError of `main` end
    with the line "error: ..." and exit status 2; a full or broken disk with "stopped: ..." and 1.
    With --verbosity=1, before the other flags, they end with a trace. SIGTERM, SIGINT and SIGHUP
    end the process as `common.termination` says, until `main` has handlers of its own.

    Args:
      main: the entry.
      stopped: what else `main` raises when its input is good and the world is not: the line
        "stopped: ..." and exit status 1.
      verbosity: of the log unless --verbosity is given; the libraries underneath tell every detail.
        None: left alone.
    """
    termination.install()
    app.run(lambda argv: call(main, stopped, verbosity), flags_parser=parse_flags)


def call(
    main: Callable[[], None],
    stopped: tuple[type[Exception], ...] = (),
    verbosity: int | None = logging.WARNING,
) -> None:
    """What `run` does once the flags are parsed."""
    if verbosity is not None and not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(verbosity)
    try:
        main()
        _flush_output()
    except (*stopped, files.StorageError) as error:
        _leave(FAILED, f"stopped: {one_line(error)}")
    except BrokenPipeError as error:
        _leave(FAILED, f"stopped: {_of_file(error)}; nobody reads what is printed")
    except Exception as error:
        # A full disk shows as errors of many types, also of libraries: it is looked for first.
        if (said := files.disk_failure(error)) is not None:
            _leave(FAILED, f"stopped: {said}; the same command goes on once there is room")
        if not isinstance(error, _BAD_INPUT):
            raise
        _leave(BAD_INPUT, f"error: {_reason_of_input(error)}")


def _flush_output() -> None:
    """Notices a full disk behind the output here, not when the interpreter ends."""
    try:
        sys.stderr.flush()
    except OSError:  # progress and notes that nobody reads
        files.silence(sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, "standard output") from error


def _reason_of_input(error: Exception) -> str:
    return _of_file(error) if isinstance(error, OSError) else one_line(error)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses as absl does; a mistake ends with one line and exit status 2.

    absl itself prints a trace for an unknown config field or a recipe that refuses its argument,
    takes empty names and arguments that nobody reads, and ends --help with status 1.
    """
    std_logging.disable(std_logging.WARNING)  # one line: no warnings of the parser before it
    try:
        with _help_is_no_failure():
            left = flags.FLAGS(argv)
    except Exception as error:  # a recipe is code: it may raise anything
        _fail(_reason(error))
    finally:
        std_logging.disable(std_logging.NOTSET)

    # What absl lets through
    if len(left) > 1:
        _fail(f"unexpected arguments: {' '.join(left[1:])}; allowed: flags, as in --name=value")
    for name in flags.FLAGS:
        if "." not in name and _is_empty(flags.FLAGS[name]):
            _fail(f"--{name}: empty; {_allowed(name)}")
    if "config" in flags.FLAGS:
        _check_recipe(flags.FLAGS["config"].value)
    return left


@contextlib.contextmanager
def _help_is_no_failure() -> Iterator[None]:
    """Gives the flags that show the help, and exit in the parser, their exit status."""
    shown = []

    def watch(flag: flags.Flag) -> None:
        parse = flag.parse

        def parse_and_tell(argument: Any) -> None:
            shown.append(flag.name)
            parse(argument)  # exits where the help is asked for
            shown.pop()

        flag.parse = parse_and_tell

    for name in ("help", "helpshort", "helpfull", "helpxml"):
        if name in flags.FLAGS:
            watch(flags.FLAGS[name])
    try:
        yield
    except SystemExit:
        if not shown:  # a recipe is code: it may exit as well
            raise
        sys.stdout.flush()
        sys.exit(DONE)


def _check_recipe(recipe: Any) -> None:
    """A file that cannot be read makes a recipe that raises when it is used."""
    try:
        _ = recipe.to_dict
    except OSError as error:
        _fail(_not_loaded(error.__cause__ or error))
    except AttributeError:
        _fail(f"--config: get_config returns {recipe!r}; allowed: a ConfigDict")


def _not_loaded(error: BaseException) -> str:
    """Why there is no recipe."""
    # Of a list of attempts only what the system says, which names the file.
    reason = re.sub(r"^.*\[Errno \d+\] ", "", one_line(error)).rstrip(".")
    return f"--config: {reason}; {_allowed('config')}"


def _is_empty(flag: flags.Flag) -> bool:
    """Whether a flag was given without the value that it needs, as --out=$UNSET is."""
    if not flag.present:
        return False
    if isinstance(flag.value, list):
        return not flag.value or not all(item.strip() for item in flag.value)
    # Where the default is a text, that text may be empty.
    return isinstance(flag.value, str) and flag.default is None and not flag.value.strip()


def _allowed(name: str) -> str:
    """What a flag takes: its help, as part of a sentence."""
    text = " ".join(flags.FLAGS[name].help.split()).rstrip(".")
    return f"allowed: {text[:1].lower()}{text[1:]}"


def _reason(error: BaseException) -> str:
    """What is wrong with the flags, in one line."""
    text = one_line(error)
    if missing := _REQUIRED.findall(text):
        names = ", ".join(f"--{name}" for name in missing)
        return f"{names}: missing" + (f"; {_allowed(missing[0])}" if len(missing) == 1 else "")
    # Outer messages name the flag, but for recipes: there they hold a trace.
    if isinstance(error, flags.Error) and "Traceback" not in text:
        return text

    # Of errors that led to one another the first one says what is wrong.
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__
    text = one_line(cause)

    if _is_of_config(cause):
        name = re.search(r"""['"](\w+)['"]""", text)
        return f"unknown config field: {repr(name[1]) if name else text}"
    if isinstance(cause, ValueError):
        return text
    if isinstance(cause, OSError):
        return _not_loaded(cause)
    return f"--config: {type(cause).__name__}: {text}"


def _is_of_config(error: BaseException) -> bool:
    """Whether a name was looked for in a config, not in a module or another object."""
    if isinstance(error, KeyError):
        return True
    return isinstance(error, AttributeError) and not isinstance(error.obj, types.ModuleType)


def _of_file(error: OSError) -> str:
    """The flag that names the file of an error, the file, and what the system says."""
    if not error.filename or not error.strerror:
        return one_line(error)
    path = os.path.abspath(os.fsdecode(error.filename))
    given = {name: flags.FLAGS[name].value for name in flags.FLAGS if flags.FLAGS[name].present}
    # Where several flags name a folder above the file, the deepest one was meant.
    folders = [
        (len(os.path.abspath(folder)), f"--{name}: ")
        for name, value in given.items()
        for folder in (value if isinstance(value, list) else [value])
        if isinstance(folder, str) and _lies_in(path, folder)
    ]
    named = max(folders)[1] if folders else ""
    return f"{named}{os.fsdecode(error.filename)}: {error.strerror}"


def _lies_in(path: str, folder: str) -> bool:
    folder = os.path.abspath(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def _fail(message: str) -> NoReturn:
    _leave(BAD_INPUT, f"error: {message}")


def _leave(status: int, line: str) -> NoReturn:
    """Ends with a line; where traces were asked for, with the error that is being handled."""
    if logging.level_debug() and sys.exc_info()[1] is not None:
        raise
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # nobody can be told; the status is what is left
            files.silence(stream)
    sys.exit(status)
