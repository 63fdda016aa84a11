"""Memory and time of weight conversions, on a synthetic checkpoint of the full width.

    python benchmarks/conversion.py --layers=4

Writes a random DiT in Tencent's layout (float32; 0.7 GB and 0.6 GB more per layer), converts it
tencent -> orbax -> diffusers -> orbax -> tencent, each in its own process, compares the first file
with the last, and prints the peak memory and the seconds per GB. The goal: no conversion takes more
memory than the largest stacked parameter and 1 GiB. Conversions hold one layer at a time, so the
peak should not depend on --layers; run it with two depths to see.
"""

from __future__ import annotations

import argparse
import filecmp
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.weights import layouts, store
from sage_grpo_jax.weights.formats.source import Index, Source

GIB = 2**30
FULL_LAYERS = 54
CHAIN = (
    ("tencent", "orbax"),
    ("orbax", "diffusers"),
    ("diffusers", "orbax"),
    ("orbax", "tencent"),
)


class RandomSource(Source):
    """Random float32 parameters, made when they are read."""

    def __init__(self, config: HunyuanVideoConfig):
        self.shapes = layouts.parameter_shapes(config)
        self._random = np.random.default_rng(0)

    def read(self, path: tuple[str, ...], index: Index) -> np.ndarray:
        # What is asked for is made, so that the model never lies in memory whole.
        sizes = zip(index, self.shapes[path], strict=True)
        shape = [len(range(*part.indices(size))) for part, size in sizes]
        return self._random.standard_normal(shape, np.float32)


def largest_leaf(config: HunyuanVideoConfig) -> int:
    """Bytes of the largest stacked parameter in float32."""
    return 4 * max(int(np.prod(shape)) for shape in layouts.parameter_shapes(config).values())


def measure(command: list[str]) -> dict[str, float]:
    """Seconds (wall and CPU), and peaks of resident and anonymous memory in bytes, of a process."""
    start, cpu = time.monotonic(), _cpu_seconds()
    process = subprocess.Popen(command)
    # Resident memory keeps its own peak (VmHWM); anonymous memory is looked at every 10 ms.
    peaks = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        for line in _status(process.pid):
            name, _, value = line.partition(":")
            if name in peaks and value.split():
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return {"seconds": time.monotonic() - start, "cpu": _cpu_seconds() - cpu, **peaks}


def _cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _status(pid: int) -> list[str]:
    try:
        return pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


def baseline() -> float:
    """Resident memory of a process that has imported everything and converts nothing."""
    code = "import sage_grpo_jax.convert, jax, time; jax.devices(); time.sleep(0.3)"
    return measure([sys.executable, "-c", code])["VmHWM"]


def main() -> None:
    """Runs the chain and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="blocks of the synthetic model")
    parser.add_argument("--folder", default=None, help="where to work; the temporary folder")
    arguments = parser.parse_args()

    # The synthetic model, and what the goal is measured by.
    config = HunyuanVideoConfig(num_layers=arguments.layers)
    source = RandomSource(config)
    size, leaf = store.total_bytes(source, np.float32), largest_leaf(config)
    full_leaf = largest_leaf(HunyuanVideoConfig(num_layers=FULL_LAYERS))

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        if shutil.disk_usage(folder).free < 3.5 * size:
            sys.exit(f"error: {folder} has not {3.5 * size / 1e9:.0f} GB free")
        first = current = folder / "0_tencent"
        store.write_model(first, config, source, "tencent")

        # Libraries alone take memory: the table tells what the weights add.
        idle = baseline()
        print(f"model: {size / 1e9:.2f} GB; largest stacked parameter: {leaf / 1e9:.2f} GB")
        print(f"an idle process: {idle / 1e9:.2f} GB")
        print("from       to           s/GB   CPU s/GB   peak GB   anonymous GB")
        peaks = []

        # Each in its own process, since a peak is that of a whole process.
        for i, (old, new) in enumerate(CHAIN, start=1):
            target = folder / f"{i}_{new}"
            flags = {"src": current, "src_format": old, "dst": target, "dst_format": new}
            found = measure(
                [sys.executable, "-m", "sage_grpo_jax.convert"]
                + [f"--{flag}={value}" for flag, value in flags.items()]
            )
            peaks.append(found["VmHWM"])
            rates = [found[name] / (size / 1e9) for name in ("seconds", "cpu")]
            memory = [found[name] / 1e9 for name in ("VmHWM", "RssAnon")]
            print(
                f"{old:10} {new:10} {rates[0]:6.2f} {rates[1]:10.2f}"
                f" {memory[0]:9.2f} {memory[1]:14.2f}",
                flush=True,
            )

            # The disk holds the first file and two steps of the chain at most.
            if current != first:
                shutil.rmtree(current)
            current = target

        file = f"{store.STEM}.safetensors"
        same = filecmp.cmp(first / file, current / file, shallow=False)
        print(f"first and last file: {'the same bytes' if same else 'DIFFERENT'}")
        for layers, parameter in ((arguments.layers, leaf), (FULL_LAYERS, full_leaf)):
            print(
                f"{layers} layers: peak {'measured' if layers == arguments.layers else 'expected'} "
                f"{max(peaks) / 1e9:.2f} GB, goal {(parameter + GIB) / 1e9:.2f} GB"
            )


if __name__ == "__main__":
    main()
