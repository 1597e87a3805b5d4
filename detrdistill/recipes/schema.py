"""The base of all that a user states: frozen, unknown keys refused, faults told on one line."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detrdistill.errors import InputError

Fraction = Annotated[float, Field(ge=0, le=1)]
M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    """Frozen, and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls: type[M], values: Any, where: str = "") -> M:
        """Validate `values`, turning pydantic's report into one line that names field, value and rule.

        Raises:
            InputError: an unknown field, a wrong type, or a value out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{where or cls.__name__}: {explain(error, cls)}") from None

    def replace(self: M, **changes: Any) -> M:
        """A copy with `changes` applied and validated; nested fields by dotted name: `replace(**{"schedule.lr": 1e-4})`."""
        values = self.model_dump(exclude=self.decided_by(changes))
        for name, value in changes.items():
            *parents, last = name.split(".")
            node = values
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
                if not isinstance(node, dict):
                    raise InputError(f"{type(self).__name__}: '{name}' has no part '{parent}' here; fields: {', '.join(values)}")
            node[last] = value.model_dump() if isinstance(value, BaseModel) else value
        return type(self).read(values)

    @classmethod
    def decided_by(cls, changes: Mapping[str, Any]) -> set[str]:
        """Fields that `changes` decide together, such as the switches of a variant: a copy does not keep them."""
        return set()


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All faults of a pydantic report on one line."""
    faults = []
    for fault in error.errors(include_url=False):
        name = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            known = ", ".join(_fields_beside(fault["loc"], model))
            faults.append(f"unknown parameter '{name}' = {fault['input']!r}; known here: {known}")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            given = "" if isinstance(fault["input"], dict) else f" = {fault['input']!r}"
            faults.append(f"'{name}'{given}: {reason}")
    return "; ".join(faults)


def _fields_beside(place: Sequence[str | int], model: type[BaseModel]) -> list[str]:
    """Names of the fields that stand where `place` points to, in whichever models the annotations admit there."""
    owners = [model]
    for part in place[:-1]:
        fields = [owner.model_fields[part] for owner in owners if part in owner.model_fields]
        # Pydantic also puts indices and the tags of unions into a place.
        tagged = [owner for owner in owners if "name" in owner.model_fields and owner.model_fields["name"].default == part]
        owners = [inner for field in fields for inner in _models(field.annotation)] or tagged or owners
    return list(dict.fromkeys(name for owner in owners for name in owner.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
