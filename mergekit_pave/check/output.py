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
    """Dtypes and the chat template."""
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


def _is_template(text: str) -> bool:
    if "{" in text:
        return len(text) >= _SHORTEST
    name = importlib.resources.files(chat_templates).joinpath(f"{text}.jinja")
    return "\n" not in text and name.is_file()
