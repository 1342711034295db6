"""Values that never change, such as plans: a copy of one is the value itself."""

from __future__ import annotations

from typing import Self


class Immutable:
    """Base of frozen dataclasses of which a copied object, such as a policy, can hold hundreds."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the value itself."""
        return self
