"""Runs the launch scripts with stand-ins for the programs of the cloud, which record words."""

import dataclasses
import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# What the scripts may use beside bash; nothing else is on PATH, a real `gcloud` least of all.
_TOOLS = """
bash cat chmod cksum cp cut date dirname env false flock git grep gzip head hostname ln ls mkdir
mkfifo mktemp mv rm sed setsid sh sleep sort tail tar tee touch tr true wc
"""
CLOUD = ("gcloud", "kubectl", "xpk")
PLACE = {"PROJECT": "my-project", "ZONE": "us-east5-b", "NAME": "run-a"}
FLAGS = ["--project=my-project", "--zone=us-east5-b"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
LIST = [
    *QUEUED,
    "list",
    *FLAGS,
    "--format=value(name.basename(),state.state,tpu.nodeSpec[0].node.labels.created_by)",
]
# Words that a shell would take apart, expand, run or lose.
HOSTILE = (
    "two words",
    "it's",
    'say "hi"',
    "a;touch INJECTED",
    "$(touch INJECTED)",
    "`touch INJECTED`",
    "$HOME",
    "a&&b|c>d<e",
    "*",
    "~",
    "\\",
    "",
    "tab\there",
    "--flag=é ü",
    "#no comment",
    "{a,b}",
    "!x",
)

# Each call becomes one record: the program and its words, each ended by NUL, and an empty line.
_STUB = r"""#!/bin/bash
here={folder}
{{ printf '%s\0' "${{0##*/}}" "$@"; printf '\n\0'; }} >>"$here/calls"
# pop FILE: its first line, which is removed unless it is the last.
pop() {{
  head -n 1 "$here/$1"
  [ "$(wc -l <"$here/$1")" -le 1 ] || sed -i 1d "$here/$1"
}}
[ ! -e "$here/behaviour" ] || . "$here/behaviour"
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a script ended."""

    status: int
    out: str
    err: str


class Stubs:
    """A folder with stand-ins on PATH, and a home."""

    def __init__(self, folder: pathlib.Path, programs: tuple[str, ...] = CLOUD) -> None:
        self.folder = folder / "stubs"
        self.home = folder / "home"
        self.programs = self.folder / "bin"
        for path in (self.programs, self.home):
            path.mkdir(parents=True)
        for tool in _TOOLS.split():
            if (real := shutil.which(tool)) is not None:
                (self.programs / tool).symlink_to(real)
        for program in programs:
            self.add(program)

    def add(self, program: str) -> None:
        """Puts one more stand-in on PATH."""
        path = self.programs / program
        path.unlink(missing_ok=True)
        path.write_text(_STUB.format(folder=self.folder))
        path.chmod(0o755)

    def behave(self, script: str) -> None:
        """What every stand-in does after it recorded its words; bash, with `pop`."""
        (self.folder / "behaviour").write_text(script)

    def queue(self, name: str, *lines: str) -> None:
        """Lines that `pop NAME` gives one after the other; the last one stays."""
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, *words: str, **variables: str) -> Result:
        """Runs a script of launch/, the first word, or another command, with these variables."""
        command = [str(LAUNCH / words[0]) if words[0].endswith(".sh") else words[0], *words[1:]]
        if words[0].endswith(".sh"):
            command.insert(0, "bash")
        done = subprocess.run(
            command,
            env=self.environment(**variables),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def environment(self, **variables: str) -> dict[str, str]:
        """PATH with the stand-ins alone, and nothing of this process."""
        base = {"PATH": str(self.programs), "HOME": str(self.home), "TMPDIR": str(self.home)}
        # Names in characters of other alphabets are words too.
        return base | {"LC_ALL": os.environ.get("LC_ALL", "C.UTF-8")} | variables

    def calls(self) -> list[list[str]]:
        """The words of every call so far; forgets them."""
        path = self.folder / "calls"
        if not path.exists():
            return []
        text = path.read_bytes().decode()
        path.unlink()
        calls, words = [], []
        for word in text.split("\0")[:-1]:
            if word == "\n":
                calls.append(words)
                words = []
            else:
                words.append(word)
        return calls
