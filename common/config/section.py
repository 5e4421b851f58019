"""The base class of the settings' sections, and types of keys that several sections use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class Section(BaseModel):
    """A section of the settings. Unknown keys are refused; the docstring below a key is its description. A
    key that is no name in Python (`for`) is the alias of its field."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, serialize_by_alias=True
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


Share = Annotated[float, Field(ge=0.0, le=1.0)]
