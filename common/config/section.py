"""The base class of the settings' sections, and types of keys that several sections use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the settings. Unknown keys are refused; the docstring below a key is its description. A
    key that is no name in Python (`for`) is the alias of its field."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, serialize_by_alias=True
    )


Share = Annotated[float, Field(ge=0.0, le=1.0)]
