"""What mergekit would only notice in the middle of a merge, or when all is merged."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator

from mergekit._data import chat_templates
from mergekit.config import MergeConfiguration

from mergekit_pave.check.finding import Finding, error, suggestion

DTYPES = ("bfloat16", "float16", "float32", "float64")
# mergekit takes anything with a brace in it for a template, but nothing shorter than this.
_SHORTEST = 20


def check_output(config: MergeConfiguration) -> Iterator[Finding]:
    """Dtypes, the chat template, and ranges of layers that are empty."""
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name and name.removeprefix("torch.") not in DTYPES:
            yield error(key, f"{name} is no dtype to merge in; {suggestion(name, DTYPES)}")
    template = config.chat_template
    if template and template != "auto" and not _is_template(template):
        names = [f.name.removesuffix(".jinja") for f in
                 importlib.resources.files(chat_templates).iterdir() if f.name.endswith(".jinja")]
        yield error(
            "chat_template", f"{template!r} is neither a template nor the name of one; "
            f"{suggestion(template, ['auto', *names])}"
        )
    pieces = [("slices", config.slices or [])]
    pieces += [(f"modules.{n}.slices", m.slices or []) for n, m in (config.modules or {}).items()]
    for where, slices in pieces:
        for i, piece in enumerate(slices):
            for source in piece.sources:
                first, end = source.layer_range
                if not 0 <= first < end:
                    yield error(
                        f"{where}[{i}]", f"layer_range {[first, end]} holds no layers: give the "
                        "first, from 0, and the one after the last."
                    )


def _is_template(text: str) -> bool:
    if "{" in text:
        return len(text) >= _SHORTEST
    name = importlib.resources.files(chat_templates).joinpath(f"{text}.jinja")
    return "\n" not in text and name.is_file()
