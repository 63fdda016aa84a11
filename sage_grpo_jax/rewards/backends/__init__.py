"""Reward models that the server can host, by name; a backend's module is imported when chosen."""

import importlib

from sage_grpo_jax.rewards.backends.base import Backend, BackendLostError, Limits, Score

__all__ = ["BACKENDS", "Backend", "BackendLostError", "Limits", "Score", "create"]

BACKENDS = {
    "moving_shapes": "sage_grpo_jax.rewards.backends.moving_shapes:MovingShapesBackend",
}


def create(name: str) -> Backend:
    """Builds a backend.

    Args:
      name: a key of `BACKENDS`, or `package.module:Class` for one's own subclass of `Backend`.

    Raises:
      ValueError: the name is neither, or the class is not a `Backend` with reward names.
    """
    path = BACKENDS.get(name, name)

    # Import: a backend may need libraries that the others do without.
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise ValueError(
            f"backend = {name!r}: allowed are {sorted(BACKENDS)} or 'package.module:Class'"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency of a backend that exists is another mistake, with its own message.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"backend = {name!r}: there is no module {error.name!r}") from error

    # Whether it keeps the contract is seen now, and not with the first clip.
    backend_class = getattr(module, class_name, None)
    if not (isinstance(backend_class, type) and issubclass(backend_class, Backend)):
        raise ValueError(f"backend = {name!r}: {path!r} is not a subclass of Backend")
    backend = backend_class()
    if not backend.names or len(set(backend.names)) != len(backend.names):
        raise ValueError(f"backend = {name!r}: names = {backend.names!r} must be distinct, not ()")
    return backend
