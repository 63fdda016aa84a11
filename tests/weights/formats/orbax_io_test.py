"""Orbax checkpoints of parameters: any mesh, any dtype, damage, plain orbax reads them too."""

import json
import shutil

import fuzz_readers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_line import one_line
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.weights import layouts
from sage_grpo_jax.weights.formats import orbax_io

CONFIG = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    text_embed_dim=8,
    text_embed_2_dim=None,
    image_embed_dim=None,
    rope_axes_dim=(4, 6, 6),
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda key: hunyuan_video.init_params(CONFIG, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "model"
    weights.save(params, path, "orbax", config=CONFIG)
    return path


def test_restores_onto_a_mesh_of_eight_devices(folder, params):
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, context=2)
    shardings = sharding.parameter_shardings(mesh, hunyuan_video.partition_names(CONFIG), params)
    assert any(len(s.spec) and s.spec != jax.P() for s in jax.tree.leaves(shardings))
    found = weights.load(folder, CONFIG, shardings)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    narrow = weights.load(folder, CONFIG, shardings, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    kernel = params["final"]["proj"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(narrow["final"]["proj"]["kernel"], kernel)


def test_sharded_arrays_are_saved_as_they_are(folder, params, tmp_path):
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, context=2)
    shardings = sharding.parameter_shardings(mesh, hunyuan_video.partition_names(CONFIG), params)
    placed = weights.load(folder, CONFIG, shardings)
    for format in ("orbax", "tencent"):
        weights.save(placed, tmp_path / format, format, config=CONFIG)
        found = weights.load(tmp_path / format, CONFIG)
        jax.tree.map(np.testing.assert_array_equal, found, params)


def test_orbax_alone_reads_it(folder, params):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params
    )
    found = ocp.load(folder / orbax_io.PARAMS, abstract)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_orbax_knows_shapes_types_and_chunks(folder, params):
    """A process reads the chunks that it needs: none may span layers, or be large."""
    stored = ocp.metadata(folder / orbax_io.PARAMS).metadata
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), dict(stored), params)
    assert all(jax.tree.leaves(same))
    kernels = [leaf for leaf in jax.tree.leaves(stored["blocks"]) if len(leaf.shape) == 3]
    assert {leaf.storage_metadata.chunk_shape[0] for leaf in kernels} == {1}
    layout = orbax_io._layout(("blocks", "kernel"), (54, 2048, 12288), np.dtype(np.float32))
    assert layout == ((1, 2048, 12288), (1, 512, 768), True)


def test_no_false_alarm(folder, params, caplog):
    weights.load(folder, CONFIG, jax.tree.map(lambda leaf: jnp.asarray(leaf).sharding, params))
    assert "malformed" not in caplog.text


def test_reads_checkpoints_whose_chunks_span_layers(params, tmp_path):
    """As training runs write them."""
    ocp.save_checkpointables(tmp_path / "run", {"state": {"params": params, "step": 3}})
    source = orbax_io.OrbaxSource(tmp_path / "run", ("state", "params"))
    for path in (("blocks", "image", "query", "kernel"), ("patch_embed", "bias")):
        want = params
        for key in path:
            want = want[key]
        assert source.shapes[path] == want.shape
        index = tuple(slice(1, 3) for _ in want.shape)
        np.testing.assert_array_equal(source.read(path, index), want[index])
    with pytest.raises(ValueError, match="has no state/weights"):
        orbax_io.OrbaxSource(tmp_path / "run", ("state", "weights"))


def test_damage(folder, params, tmp_path):
    with pytest.raises(ValueError, match="state: not from an orbax checkpoint"):
        orbax_io.OrbaxSource(tmp_path)
    weights.save(params, tmp_path / "cut", "orbax", config=CONFIG)
    arrays = tmp_path / "cut" / orbax_io.PARAMS / "state"
    chunk = next((arrays / "blocks.text.query.kernel" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"blocks\.text\.query\.kernel cannot be read"):
        weights.load(tmp_path / "cut", CONFIG)
    chunk.unlink()
    with pytest.raises(ValueError, match=r"blocks\.text\.query\.kernel cannot be read"):
        weights.load(tmp_path / "cut", CONFIG)
    deeper = HunyuanVideoConfig(**{**CONFIG.__dict__, "num_layers": 4})
    with pytest.raises(ValueError, match=r"of another shape: blocks/image/.*, "):
        weights.load(folder, deeper)
    vision = HunyuanVideoConfig(**{**CONFIG.__dict__, "image_embed_dim": 5})
    with pytest.raises(ValueError, match="missing: image_embed/"):
        weights.load(folder, vision)


# Damage as `sample` meets it


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "good"
    fuzz_readers.DOORS["orbax"].write(path)
    return path


@pytest.fixture
def orbax(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def load_on_device(folder):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = layouts.parameter_shapes(fuzz_readers.DIT)
    tree = {}
    for path in shapes:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = place
    return weights.load(folder, fuzz_readers.DIT, tree)


ARRAY = "params/state/blocks.image.query.kernel"


def _edit(change):
    def edit(folder):
        file = folder / ARRAY / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return edit


def _cut(folder):
    chunk = next(file for file in (folder / ARRAY / "c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9])


def _remove_chunk(folder):
    next(file for file in (folder / ARRAY / "c").rglob("*") if file.is_file()).unlink()


def _escape(folder):
    file = folder / "params/state/_METADATA"
    text = file.read_text().replace('"key": "patch_embed"', '"key": "../../patch_embed"')
    assert "../.." in text
    file.write_text(text)


DAMAGES = {
    "cut": (_cut, "blocks.image.query.kernel cannot be read"),
    "chunk": (_remove_chunk, "blocks.image.query.kernel cannot be read"),
    "record": (lambda f: (f / ARRAY / "zarr.json").unlink(), "query.kernel cannot be read"),
    "text": (lambda f: (f / ARRAY / "zarr.json").write_text("{"), "query.kernel cannot be read"),
    "shape": (_edit({"shape": [2, 8, 9]}), "blocks/image/query/kernel"),
    "dtype": (_edit({"data_type": "int32"}), "query.kernel cannot be read"),
    "tree": (lambda f: (f / "params/state/_METADATA").write_text("{}"), "use_zarr3|tree_metadata"),
    "outside": (_escape, "tree_metadata: .*no name of an array"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_orbax_weights(damage, orbax, capfd):
    """As `sample` loads them: onto devices. Nothing but the line of the error is written."""
    jax.tree.map(np.asarray, load_on_device(orbax))
    capfd.readouterr()
    change, message = DAMAGES[damage]
    change(orbax)
    with pytest.raises(ValueError, match=message) as error:
        load_on_device(orbax)
    assert str(orbax) in one_line(error)
    assert capfd.readouterr() == ("", "")
