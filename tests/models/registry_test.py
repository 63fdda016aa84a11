"""The registry of models: every entry keeps the contract of the door, and nothing else is named."""

import inspect
import json
import pathlib
import re

import jax
import pytest

import sage_grpo_jax
from sage_grpo_jax.models import door, hunyuan_video, lora, registry, vae
from sage_grpo_jax.weights import layouts

PACKAGE = pathlib.Path(sage_grpo_jax.__file__).parent
PROTOCOLS = {registry.TRANSFORMER: door.VideoModel, registry.AUTOENCODER: door.VideoAutoencoder}


def required(protocol: type) -> tuple[set[str], set[str]]:
    """(attributes, functions) that a protocol asks for."""
    functions = {name for name, value in vars(protocol).items() if inspect.isfunction(value)}
    functions = {name for name in functions if not name.startswith("_")}
    return set(protocol.__annotations__), functions


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_every_model_has_what_the_door_asks_for(name):
    model, protocol = registry.named(name), PROTOCOLS[registry.ENTRIES[name].kind]
    attributes, functions = required(protocol)
    assert len(attributes) >= 3
    assert len(functions) >= 7
    for attribute in attributes:
        assert hasattr(model, attribute), attribute
    for function in functions:
        # Called by place: the first parameters are those of the protocol, the others have defaults.
        want = [*inspect.signature(getattr(protocol, function)).parameters.values()][1:]
        have = [*inspect.signature(getattr(model, function)).parameters.values()]
        assert len(have) >= len(want), function
        assert all(p.default is not p.empty for p in have[len(want) :]), function
        for ours, theirs in zip(want, have, strict=False):
            assert (ours.default is ours.empty) >= (theirs.default is theirs.empty), function


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_configs_find_their_model_and_come_back_from_json(name):
    model = registry.named(name)
    config = model.Config()
    assert registry.of(config) is model
    assert registry.name_of(config) == name
    values = json.loads(config.to_json())
    assert values["_class_name"] == name
    assert model.Config.from_values(values) == config
    assert hash(config) == hash(model.Config())


@pytest.mark.parametrize("name", registry.names(registry.TRANSFORMER))
def test_adapter_layers_are_the_dense_layers_of_the_released_models(name):
    model = registry.named(name)
    assert tuple(model.ADAPTER_TARGETS) == lora.TARGETS
    chosen = [path for paths in model.ADAPTER_TARGETS.values() for path in paths]
    assert set(chosen) <= set(model.ADAPTER_LAYERS)
    assert len(set(model.ADAPTER_LAYERS)) == len(model.ADAPTER_LAYERS)
    found = set()
    for config in {model.Config(), *model.RELEASED.values()}:
        shapes = layouts.parameter_shapes(config)
        for path in chosen:
            assert (*path.split("/"), "kernel") in shapes
        found |= {
            "/".join(path[:-1])
            for path, shape in shapes.items()
            if path[-1] == "kernel" and len(shape) == 2 + ("blocks" in path)
        }
    assert found == set(model.ADAPTER_LAYERS)


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_weight_tables_hold_for_the_released_config(name):
    config, module = registry.named(name).Config(), registry.tables_of(name)
    assert next(iter(module.LAYOUTS)) == "diffusers"
    for layout, entry in module.LAYOUTS.items():
        rows, shapes = layouts.key_table(config, layout)
        names = {there: () for row in rows for there in row.names()}
        assert len(shapes) == len(rows)
        assert entry.mark in names
        assert layouts.recognise(names) == (name, layout)
    fields = set(config.__dataclass_fields__)
    assert set(module.SHAPELESS) <= fields


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_partition_names_are_a_tree_like_the_parameters(name):
    model, config = registry.named(name), registry.named(name).Config()
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    names = model.partition_names(config)
    ranks = jax.tree.map(lambda n: len(n), names, is_leaf=lambda n: isinstance(n, tuple))
    assert ranks == jax.tree.map(lambda s: s.ndim, shapes)


def test_released_variants():
    names = registry.variants()
    assert len(names) == len(set(names)) >= 12
    assert registry.released("transformer", "480p_i2v_step_distilled").use_meanflow
    assert not registry.released("transformer", "480p_i2v_distilled").use_meanflow
    assert registry.released("transformer", "720p_t2v") == hunyuan_video.HunyuanVideoConfig(
        target_size=960, task_type="t2v"
    )
    for name in names:
        assert registry.kind_of(registry.released("autoencoder", name)) == "autoencoder"
    with pytest.raises(ValueError, match=r"variant='360p': must be one of .*'480p_t2v'"):
        registry.released("transformer", "360p")


def test_what_is_not_registered_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"_class_name='Nobody': must be one of .*'Autoencoder"):
        registry.named("Nobody")
    with pytest.raises(ValueError, match=r"must be the config of one of \['HunyuanVideo15"):
        registry.of(object())
    assert registry.kind_of(vae.VaeConfig()) == registry.AUTOENCODER


def test_no_other_module_names_a_family():
    """A model's own files, its weight tables and the registry do; and whoever encodes its texts."""
    families = re.compile(r"[Hh]unyuan|\b(wan|Wan)(?![a-z])")
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE).as_posix()
        if inside.startswith(("models/", "text_encoders/")) or file.name.startswith(FAMILIES):
            continue
        assert not families.search(file.read_text()), inside
    for room in ("models", "text_encoders"):
        for file in (PACKAGE / room).glob("*.py"):
            if not file.name.startswith(FAMILIES) and file.name != "registry.py":
                source = file.read_text()
                imported = re.findall(r"^from sage_grpo_jax\S* import .*", source, re.MULTILINE)
                assert file.name in OWN or not any(map(families.search, imported)), file.name


FAMILIES = ("hunyuan", "wan")
# Files of the first family that carry no name of it.
OWN = ("double_stream.py", "text_refiner.py", "vae.py")
