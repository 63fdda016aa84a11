"""Finds model folders in diffusers' layout, and tells one set of weights from another."""

import hashlib
import pathlib
from typing import NamedTuple

from sage_grpo_jax.weights.formats import safetensors_io

_MODEL_FILE = "config.json"
_TOKENIZER_FILE = "tokenizer_config.json"
_IMAGE_PROCESSOR_FILE = "preprocessor_config.json"


class ModelFolders(NamedTuple):
    """A network, and what prepares its input: a tokenizer, or an image processor."""

    model: pathlib.Path
    processor: pathlib.Path


def find_text_encoder(path: str, field: str = "text_encoder") -> ModelFolders:
    """A text encoder and its tokenizer: a pipeline's folder, its text_encoder/, or both in one."""
    return _find(path, field, "text_encoder", "tokenizer", _TOKENIZER_FILE)


def find_byt5(path: str, field: str = "byt5") -> ModelFolders:
    """Glyph-ByT5 and its tokenizer: a pipeline's folder, its text_encoder_2/, or both in one."""
    return _find(path, field, "text_encoder_2", "tokenizer_2", _TOKENIZER_FILE)


def find_image_encoder(path: str, field: str = "image_encoder") -> ModelFolders:
    """SigLIP and its image processor: a pipeline's folder, its image_encoder/, or both in one."""
    return _find(path, field, "image_encoder", "feature_extractor", _IMAGE_PROCESSOR_FILE)


def find_vae(path: str, field: str = "vae") -> pathlib.Path:
    """The VAE's folder: given, or vae/ of a pipeline's folder."""
    root = _existing(path, field)
    return _with_file([root / "vae", root], _MODEL_FILE, root, field)


def fingerprint(folder: pathlib.Path) -> str:
    """SHA-256 over a model folder's config.json and its weights files' names, sizes and headers.

    The values of the weights are not read (they are tens of GB): two fine-tunings of one model
    that were saved alike have the same fingerprint.

    Raises:
      ValueError: no weights, or files that are none.
    """
    digest = hashlib.sha256((folder / _MODEL_FILE).read_bytes())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors; weights in other formats are not read")
    for file in files:
        try:
            header = safetensors_io.header_text(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
    return digest.hexdigest()


def processor_fingerprint(folder: pathlib.Path) -> str:
    """SHA-256 over the small files of a tokenizer's or image processor's folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        # Not the pictures and weights that may lie there too: they decide no token.
        if file.is_file() and file.suffix in (".json", ".txt", ".jinja", ".model"):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _find(path: str, field: str, model: str, processor: str, file: str) -> ModelFolders:
    root = _existing(path, field)
    network = _with_file([root / model, root], _MODEL_FILE, root, field)
    # In the network's own folder, or beside it in a pipeline's.
    candidates = [network, network.parent / processor]
    return ModelFolders(network, _with_file(candidates, file, root, field))


def _existing(path: str, field: str) -> pathlib.Path:
    root = pathlib.Path(path).absolute()
    if not root.is_dir():
        raise ValueError(f"{field}={path}: no such folder")
    return root


def _with_file(
    folders: list[pathlib.Path], file: str, root: pathlib.Path, field: str
) -> pathlib.Path:
    """The first folder that holds a file."""
    for folder in folders:
        if (folder / file).is_file():
            return folder
    places = " or ".join(str(folder / file) for folder in folders)
    raise ValueError(f"{field}={root}: no {places}")
