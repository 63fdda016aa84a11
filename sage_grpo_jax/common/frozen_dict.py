"""A dictionary that cannot change, so that configs that hold one can be compared and hashed."""

from typing import Any, NoReturn, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A dict that refuses every change and has a hash; equal to a dict with the same entries.

    As a subclass of dict it is JSON, and `dataclasses.asdict` and ConfigDict take it as they take
    any other. Its entries are attributes too, as those of a ConfigDict are. Like a dict's, its
    equality does not see the order of its entries.
    """

    def __getattr__(self, name: str) -> V:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r}; there are {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        self._refuse()

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of a dict are filled entry by entry, which this one refuses.
        return type(self), (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be changed: make another one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse
