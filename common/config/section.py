"""The base class of the settings' sections, and types of keys that several sections use."""

from __future__ import annotations

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from latent_grpo.common.remote_url import checked_url


class Section(BaseModel):
    """A section of the settings. Unknown keys are refused; the docstring below a key is its description. A
    key that is no name in Python (`for`) is the alias of its field."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
    )


class AsGiven(Section):
    """A section in which a key that nobody set means something else than its default that somebody set.

    Such a key stays away from a file: written out, the default would become a demand when the file is read again.
    """

    @property
    def given(self) -> dict[str, Any]:
        """The keys that somebody set."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {name: value for name, value in written.items() if name in self.model_fields_set}


def with_home(path: str) -> str:
    """Returns a path with `~` and `~user` at its beginning, or after `hf:`, written out.

    A shell does that only at the beginning of a word, and nobody does it in a file. Raises ValueError for a user
    without a home folder.
    """
    prefix, rest = ("hf:", path[3:]) if path.startswith("hf:~") else ("", path)
    if not rest.startswith("~"):
        return path
    found = os.path.expanduser(rest)
    if found.startswith("~"):
        raise ValueError(f"there is no home folder {rest.partition('/')[0]!r}; write the path in full, got {path!r}")
    return prefix + found


LocalPath = Annotated[str, AfterValidator(with_home)]
"""A path of this machine, or a name elsewhere, which never begins with `~`."""
StoragePlace = Annotated[LocalPath, AfterValidator(checked_url)]
"""A path of this machine, or the URL of a folder in an object store."""
SEED_LIMIT = 2**63
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
"""A seed of a run: it is kept in signed 64-bit columns, and generators take none below 0."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
