"""A registry: named things of one kind, found by name, never replaced in silence."""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from onnxfuse.errors import RegistryError

__all__ = ["Registry"]

V = TypeVar("V")


class Registry(Mapping[str, V], Generic[V]):
    """A mapping from kebab-case names to implementations of one protocol.

    Args:
        kind: What the members are, in the singular, for messages: ``"importance"``.

    Example:
        >>> solvers = Registry[int]("solver")
        >>> _ = solvers.register("exact")(1)
        >>> solvers["exact"]
        1
        >>> solvers["exakt"]
        Traceback (most recent call last):
        ...
        onnxfuse.errors.RegistryError: there is no solver called 'exakt'
          mend: did you mean 'exact'? Known: exact
    """

    def __init__(self, kind: str) -> None:
        """Start empty."""
        self.kind = kind
        self._members: dict[str, V] = {}

    def register(self, name: str) -> Callable[[V], V]:
        """Return a decorator that enters its argument under ``name``.

        Raises:
            RegistryError: ``name`` is taken (raised by the decorator).
        """

        def enter(member: V) -> V:
            if name in self._members:
                what = f"there is a {self.kind} called {name!r} already"
                raise RegistryError(what, mend="choose another name")
            self._members[name] = member
            return member

        return enter

    def __getitem__(self, name: str) -> V:
        """Return the member called ``name``; an unknown name is a `RegistryError` that lists the known ones."""
        try:
            return self._members[name]
        except KeyError:
            close = get_close_matches(name, self._members, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            mend = f"{hint}Known: {', '.join(self._members)}"
            what = f"there is no {self.kind} called {name!r}"
            raise RegistryError(what, mend=mend) from None

    def __contains__(self, name: object) -> bool:
        """Return whether there is a member called ``name``."""
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the order of registration."""
        return iter(self._members)

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self._members)
