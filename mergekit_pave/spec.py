"""Our parameters as mergekit's methods declare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods import ParameterScope
from mergekit.merge_methods.base import ParameterSpec

from mergekit_pave.parameters import Parameter


@dataclass(frozen=True)
class CheckedSpec(ParameterSpec):
    """A parameter whose bad values are refused in one sentence, while mergekit plans."""

    parameter: Parameter | None = None

    def validate(self, value: Any) -> Any:
        return self.parameter.validate(value)


def spec_of(parameter: Parameter) -> CheckedSpec:
    return CheckedSpec(
        name=parameter.name,
        value_type=parameter.kind | None,
        scope=ParameterScope.NON_BASE if parameter.per_model else ParameterScope.SHARED,
        default=parameter.default,
        description=parameter.doc,
        parameter=parameter,
    )
