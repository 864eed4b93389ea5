"""A merge configuration, read once and handed to all who look at it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod

from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.inputs import Group, Input, groups_of, inputs_of, unwrapped
from mergekit_pave.recipe.reading import CONFIGURATION, configuration, read_yaml


@dataclass(frozen=True)
class Recipe:
    """What a merge is made of.

    Attributes:
        config: mergekit's reading of the YAML.
        raw: what the YAML says itself, with the keys that mergekit drops.
    """

    config: MergeConfiguration
    raw: Any

    @classmethod
    def of(cls, raw: Any) -> Recipe:
        """The recipe of parsed YAML; raises `PaveError` where mergekit cannot read it."""
        return cls(configuration(raw), raw)

    @classmethod
    def as_written(cls, config: MergeConfiguration, source: str | None) -> Recipe:
        """The recipe of a configuration that mergekit has read, perhaps from the YAML `source`."""
        if source:
            raw = read_yaml(source)
            # A caller's source may be a mere label, and planning rewrites `config` in place.
            try:
                if configuration(raw) == config:
                    return cls(config, raw)
            except PaveError:
                pass
        return cls(config, _named(config.model_dump(exclude_none=True)))

    @cached_property
    def method(self) -> MergeMethod:
        """The registered method."""
        return merge_methods.get(self.config.merge_method)

    @property
    def inner(self) -> MergeMethod:
        """The method, or the one that a purified twin wraps."""
        return unwrapped(self.method)

    @property
    def base(self) -> ModelReference:
        """The base; without one, the model whose config and tokenizer the merge gets."""
        return self.config.base_model or self.config.referenced_models()[0]

    @cached_property
    def groups(self) -> list[Group]:
        """What is merged with what."""
        return list(groups_of(self.config))

    @cached_property
    def entries(self) -> list[Input]:
        """The fine-tuned models, once for each slice."""
        return [entry for group in self.groups for entry in group.fine_tunes(self.method)]

    @cached_property
    def inputs(self) -> list[Input]:
        """The fine-tuned models, once for each set of calibration keys."""
        return inputs_of(self.entries)


def read_raw(path: Path) -> Any:
    """What the YAML of a merge says, or the one beside a merge's output.

    Raises:
        PaveError: there is none, or it is no YAML in UTF-8.
    """
    file = path / CONFIGURATION if path.is_dir() else path
    try:
        return read_yaml(file.read_text("utf-8"), str(file))
    except FileNotFoundError:
        raise PaveError(
            f"{path} has no {CONFIGURATION}: it is no output of mergekit-yaml; name the merge's "
            "configuration with --config.") from None
    except UnicodeDecodeError as error:
        raise PaveError(f"{file} is not text in UTF-8: {error.reason}.") from error
    except OSError as error:
        raise PaveError(f"{file} cannot be read: {error}.") from error


def _named(value: Any) -> Any:
    """`value` with models as strings: mergekit gives up on turning a path with a space into one."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return str(value) if isinstance(value, ModelReference) else value
