"""LoRA files as peft and diffusers write them, of any layers that the model has.

For each adapted layer a file has A (`lora_A.weight` [r, in]) and B (`lora_B.weight` [out, r]),
below "transformer." (diffusers) or "base_model.model." (peft). Rank and alpha are JSON in the
file's metadata or in adapter_config.json beside it, and may differ from layer to layer. Sources:
`diffusers/loaders/{peft,lora_base}.py`, `diffusers/utils/peft_utils.py`, `peft/tuners/lora/`.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import lora as lora_lib
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import TransformerConfig
from sage_grpo_jax.models.lora import LoraConfig
from sage_grpo_jax.weights import layouts
from sage_grpo_jax.weights.formats import safetensors_io, torch_zip
from sage_grpo_jax.weights.formats.source import FLOATS, Index, Path, Shape, Source, is_stacked
from sage_grpo_jax.weights.formats.stored_tensor import StoredTensor
from sage_grpo_jax.weights.tables.key_table import Row

STEM = "pytorch_lora_weights"
METADATA = "lora_adapter_metadata"
PREFIX = "transformer."
_PREFIXES = (PREFIX, "base_model.model.")  # diffusers' and peft's own
_PEFT_STEM, _PEFT_CONFIG = "adapter_model", "adapter_config.json"
# A name behind lora_A is that of the adapter, where a whole model's state was saved.
_TENSOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<part>[AB])(?:\.\w+)?\.weight|(?P<alpha>alpha))")
_LITERAL = re.compile(r"\^?[\w.]+")
_LISTED = 20
# Settings of peft under which a layer is not W + scale B A; the tensors tell of layers and biases.
_OTHERWISE = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication",
              "modules_to_save", "trainable_token_indices", "target_parameters", "arrow_config",
              "use_bdlora", "kasa_config", "monteclora_config")  # fmt: skip
# Fresh adapters under these leave W as it is; under others (pissa, olora, ...) W was changed too.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


_Place = tuple[Path, int | None]  # a layer of ours: its path, and the number of the block


class _Pair(NamedTuple):
    """A layer's name in diffusers, its A and B, and by what B is multiplied."""

    name: str
    down: StoredTensor
    up: StoredTensor
    factor: float


class _Settings(NamedTuple):
    """What peft says about adapters; by the end of a layer's name where layers differ."""

    rank: int | None
    alpha: float | None
    ranks: dict[str, int]
    alphas: dict[str, float]
    rooted: bool  # the scale is alpha / sqrt(r)


class _AdapterSource(Source):
    """Adapters of a file, all at one rank and scale; a layer that the file has not is zero.

    Args:
      pairs: by path in the tree and layer (None: not stacked).
      shapes: of the adapters, by path, ending in down or up.
    """

    def __init__(
        self, pairs: Mapping[tuple[Path, int | None], _Pair], shapes: Mapping[Path, Shape]
    ) -> None:
        self.shapes, self._pairs = dict(shapes), pairs

    def read(self, path: Path, index: Index) -> np.ndarray:
        shape = self.shapes[path]
        if not is_stacked(path):
            return self._read_layer(path, None, shape)[index]
        out = np.zeros((len(range(*index[0].indices(shape[0]))), *shape[1:]), np.float32)
        for i, layer in enumerate(range(*index[0].indices(shape[0]))):
            out[i] = self._read_layer(path, layer, shape[1:])
        return out[(slice(None), *index[1:])]

    def describe(self, path: Path, layer: int | None) -> str:
        pair = self._pairs.get((path[:-1], layer))
        if pair is None:
            return super().describe(path, layer)
        return f"{pair.name}.lora_{'A' if path[-1] == 'down' else 'B'}.weight"

    def _read_layer(self, path: Path, layer: int | None, shape: Shape) -> np.ndarray:
        """[in, r] or [r, out] in float32, which holds every smaller type."""
        out, pair = np.zeros(shape, np.float32), self._pairs.get((path[:-1], layer))
        with np.errstate(over="ignore"):  # infinite values are refused where they are used
            if pair is not None and path[-1] == "down":
                out[:, : pair.down.shape[0]] = pair.down.read().T
            elif pair is not None:
                values = pair.up.read().T.astype(np.float32)
                out[: len(values)] = values if pair.factor == 1 else values * pair.factor
        return out


class Opened(NamedTuple):
    """Adapters to be read by slices, what they are, and what a full set has that they have not."""

    source: Source
    lora: LoraConfig
    untrained: str


def open_file(path: pathlib.Path, config: TransformerConfig) -> Opened:
    """Adapters of a file, or of the one in a folder; headers only are read here.

    Args:
      path: the file or folder.
      config: of the model that they belong to.

    Raises:
      ValueError: naming the file: it cannot be read, or holds anything but plain adapters of layers
        that this model has.
    """
    file = _find_file(path)
    if file.suffix in torch_zip.SUFFIXES:
        tensors, header = torch_zip.read_file(file), {}
    else:
        tensors, header = safetensors_io.read_file(file)

    settings = _read_settings(file, header)
    try:
        return _open(tensors, settings, config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def module_rows(config: TransformerConfig) -> dict[Path, Row]:
    """The row of the kernel of each layer that can be adapted, in diffusers' layout."""
    rows = {row.ours: row for row in layouts.rows(config, "diffusers")}
    paths = (tuple(layer.split("/")) for layer in registry.of(config).ADAPTER_LAYERS)
    return {path: rows[(*path, "kernel")] for path in paths if (*path, "kernel") in rows}


def module_name(row: Row) -> str:
    """diffusers' name of a layer, with {i} for the block where there are several."""
    return row.theirs.removesuffix(".weight")


def adapter_shapes(config: TransformerConfig, lora: LoraConfig) -> dict[Path, Shape]:
    """The shape of each adapter, by path."""
    shapes = traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(shape, np.float32)
            for path, shape in layouts.parameter_shapes(config).items()
        }
    )
    flat = traverse_util.flatten_dict(lora_lib.abstract_adapters(shapes, lora, registry.of(config)))
    return {path: leaf.shape for path, leaf in flat.items()}


def _find_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    suffixes = (safetensors_io.SUFFIX, ".bin")
    for named in (path / f"{stem}{end}" for stem in (STEM, _PEFT_STEM) for end in suffixes):
        if named.is_file():
            return named
    found = sorted(path.glob(f"*{safetensors_io.SUFFIX}")) if path.is_dir() else []
    if len(found) != 1:
        raise ValueError(
            f"path={path}: must be a file of adapters, or hold {STEM}{safetensors_io.SUFFIX}"
        )
    return found[0]


def _read_settings(file: pathlib.Path, header: Mapping[str, str]) -> _Settings | None:
    """From the file's metadata, or from peft's own adapter_config.json beside it.

    Raises:
      ValueError: naming where they are: other types, or adapters that are not plain.
    """
    beside, where = file.parent / _PEFT_CONFIG, f"{file}: {METADATA}"
    values = None
    if METADATA not in header:
        if not beside.is_file():
            return None
        values, where = checked_json.load(beside), str(beside)
    try:
        values = checked_json.parse(header[METADATA]) if values is None else values
        return _parse_settings({_plain(name): value for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parse_settings(values: Mapping[str, Any]) -> _Settings:
    special = {name: values[name] for name in _OTHERWISE if values.get(name)}
    start, kind = values.get("init_lora_weights"), values.get("peft_type", "LORA")
    if not isinstance(start, bool | None) and start not in _PLAIN_STARTS:
        special["init_lora_weights"] = start
    if special or kind != "LORA":
        shown = checked_json.shown(special or {"peft_type": kind})
        raise ValueError(f"{shown}: only plain adapters (W + alpha / r B A) are supported")
    return _Settings(
        rank=checked_json.typed(values.get("r"), int | None, "r"),
        alpha=checked_json.typed(values.get("lora_alpha"), float | None, "lora_alpha"),
        ranks=_patterns(values, "rank_pattern", int),
        alphas=_patterns(values, "alpha_pattern", float),
        rooted=checked_json.typed(values.get("use_rslora", False), bool, "use_rslora"),
    )


def _patterns(values: Mapping[str, Any], field: str, kind: type) -> dict[str, Any]:
    patterns = checked_json.typed(values.get(field), dict[str, kind] | None, field) or {}
    for pattern in patterns:
        if not _LITERAL.fullmatch(pattern.replace("\\.", ".")):
            raise ValueError(
                f"{field}: {checked_json.shown(pattern)}: regular expressions are not supported"
            )
    return {pattern.replace("\\.", "."): value for pattern, value in patterns.items()}


def _open(
    tensors: Mapping[str, StoredTensor], settings: _Settings | None, config: TransformerConfig
) -> Opened:
    layers = _layers(config)
    files, alphas = _sort(tensors, layers)
    shapes = layouts.parameter_shapes(config)
    found = {}
    for name, parts in files.items():
        path, _ = layers[name]
        rank = _check_pair(name, parts, shapes[(*path, "kernel")][-2:], config.hidden_size)
        found[name] = rank, _alpha(name, rank, settings, alphas)

    # One rank and one scale for all: lower ranks are filled up with zeros, other scales go into B.
    rank, alpha = next(iter(found.values()))
    if len(set(found.values())) > 1:
        rank = max(r for r, _ in found.values())
        scales = collections.Counter(a / r for r, a in found.values())
        alpha = rank * scales.most_common(1)[0][0]
    pairs = {
        layers[name]: _Pair(name, parts["A"], parts["B"], a / r / (alpha / rank))
        for (name, parts), (r, a) in zip(files.items(), found.values(), strict=True)
    }
    targets = lora_lib.targets_of((path for path, _ in pairs), registry.of(config))
    lora = LoraConfig(rank, alpha, targets)
    return Opened(
        _AdapterSource(pairs, adapter_shapes(config, lora)), lora, _untrained(pairs, config)
    )


def _layers(config: TransformerConfig) -> dict[str, _Place]:
    """From diffusers' names of layers to ours and the number of the block."""
    return {
        module_name(row).format(i=i): (path, None if row.stacked is None else i)
        for path, row in module_rows(config).items()
        for i in range(row.stacked or 1)
    }


def _sort(
    tensors: Mapping[str, StoredTensor], layers: Mapping[str, Any]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """({layer: {"A": .., "B": ..}}, {layer: alpha}) of the tensors in a file."""
    files: dict[str, dict[str, StoredTensor]] = collections.defaultdict(dict)
    alphas, unexpected, twice = {}, [], []

    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(_plain(name))
        if match is None or match["module"] not in layers:
            unexpected.append(_plain(name))
            continue
        module, part = match["module"], match["part"]
        where, key = (alphas, module) if part is None else (files[module], part)
        if key in where:
            twice.append(name)
        where[key] = tensor
    if not files:
        raise ValueError(f"no adapters of this model; tensors begin with {sorted(tensors)[:3]}")

    missing = [f"{name}.lora_{part}.weight" for name in {**files, **alphas} for part in "AB"
               if part not in files.get(name, {})]  # fmt: skip
    problems = {"missing": missing, "unexpected": unexpected, "there twice": twice}
    text = [f"{what}: {', '.join(sorted(names)[:_LISTED])}" for what, names in problems.items()
            if names]  # fmt: skip
    if text:
        raise ValueError(f"tensors that are no pairs of adapters of this model; {'; '.join(text)}")
    return files, alphas


def _check_pair(
    name: str, parts: Mapping[str, StoredTensor], fans: tuple[int, int], most: int
) -> int:
    """The rank of a layer's adapters, whose dtypes and shapes are checked."""
    fan_in, fan_out = fans
    rank = parts["A"].shape[0] if parts["A"].shape else 0
    if not 1 <= rank <= most:
        raise ValueError(f"{name}.lora_A.weight: rank {rank}: must be 1 to {most}")
    for part, shape in (("A", (rank, fan_in)), ("B", (fan_out, rank))):
        tensor, full = parts[part], f"{name}.lora_{part}.weight"
        if tensor.shape != shape:
            raise ValueError(f"{full}: {tensor.shape} instead of {shape}")
        if str(tensor.dtype) not in FLOATS:
            raise ValueError(f"{full} is {tensor.dtype}: must be one of {FLOATS}")
    return rank


def _alpha(
    name: str, rank: int, settings: _Settings | None, alphas: Mapping[str, StoredTensor]
) -> float:
    """What, divided by the rank, is the scale of a layer's adapters."""
    given = None
    if settings is not None:
        wanted = _by_pattern(settings.ranks, name, settings.rank)
        if wanted not in (None, rank):
            raise ValueError(f"r={wanted} in the metadata, the tensors of {name} have rank {rank}")
        given = _by_pattern(settings.alphas, name, settings.alpha)
        if given is None and not alphas:
            raise ValueError("lora_alpha is missing in the metadata")

    if alphas:
        if name not in alphas:
            raise ValueError(f"{name}.alpha is missing, other layers have theirs")
        stored = float(_scalar(alphas[name], f"{name}.alpha"))
        if given not in (None, stored):
            raise ValueError(f"alphas differ: {name}.alpha: {stored}, metadata: {given}")
        given = stored

    if given is None:
        return float(rank)  # as diffusers
    if not 0 < given < math.inf:
        raise ValueError(f"alpha of {name}: {given}: must be greater than 0 and finite")
    return given * math.sqrt(rank) if settings and settings.rooted else float(given)


def _scalar(tensor: StoredTensor, name: str) -> np.ndarray:
    if math.prod(tensor.shape) != 1 or tensor.dtype == np.bool_:
        raise ValueError(f"{name}: {tensor.dtype}{list(tensor.shape)}: must be a number")
    return tensor.read().reshape(())


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of a layer's name, or with ^ all of it."""
    for pattern, value in patterns.items():
        end = pattern.removeprefix("^")
        if name == end or (end == pattern and name.endswith(f".{end}")):
            return value
    return otherwise


def _untrained(pairs: Collection[_Place], config: TransformerConfig) -> str:
    """What adapters of attention and MLP would have, and these have not; "": nothing."""
    model = registry.of(config)
    every = lora_lib.adapted_paths(LoraConfig(1, 1.0), model)
    layers = collections.defaultdict(set)
    for path, layer in pairs:
        layers[path].add(layer)
    absent = lora_lib.targets_of((path for path in every if path not in layers), model)
    by_gap = collections.defaultdict(list)
    for path in every:
        gap = tuple(sorted(set(range(config.num_layers)) - layers[path]))
        if gap and layers[path]:
            by_gap[gap].append(path)
    some = [f"layers {_ranges(gap)} of {', '.join(lora_lib.targets_of(paths, model))}"
            for gap, paths in by_gap.items()]  # fmt: skip
    return "; ".join([", ".join(absent)] * bool(absent) + some)


def _ranges(numbers: Sequence[int]) -> str:
    """(0, 2, 3, 4) -> "0, 2-4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
