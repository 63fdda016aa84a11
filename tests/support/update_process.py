"""One update of the shipped policy in a process of its own: XLA as users have it, not as conftest.

As a script it reads JSON overrides of the quick start's recipe and the names of objectives, and
writes JSON: the metrics of the update with the first one, and the cosine of its gradient to that of
the last one.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]


def measure(
    overrides: dict[str, object], objectives: tuple[str, ...] = ("ppo",)
) -> dict[str, float]:
    """Metrics of one update and `cosine`; see above. "reinforce" is the loss without clipping."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([overrides, objectives]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _config(overrides: dict[str, object]):
    from sage_grpo_jax.config import builder

    spec = importlib.util.spec_from_file_location("quick_start", ROOT / "configs/moving_shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
    values.update_from_flattened_dict(overrides)
    return builder.from_config_dict(values)


def _main() -> None:
    import jax
    import learners
    import numpy as np
    import optax

    from sage_grpo_jax.parallel import mesh as mesh_lib

    overrides, objectives = json.load(sys.stdin)
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    gradients, metrics, latents = [], {}, None
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        for objective in objectives:
            config = _config({**overrides, "loss.objective": objective})
            trainer = learners.make(config, None, mesh, pathlib.Path(folder))
            prompts = next(iter(trainer.prompts))
            latents = trainer.rollout(prompts).latents if latents is None else latents
            batch = trainer.update_batch(prompts, latents)

            state, found = trainer.learner.update(trainer.state, batch)
            metrics = metrics or found
            # Adam's first moment after updates from zero that do not move the parameters is the
            # gradient, but for a factor.
            moments = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
            gradients.append(np.concatenate([np.ravel(m).astype(np.float64) for m in moments]))
    a, b = gradients[0], gradients[-1]
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    print(json.dumps({**metrics, "cosine": cosine}))


if __name__ == "__main__":
    _main()
