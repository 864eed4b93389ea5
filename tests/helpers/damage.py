"""Values and files in the place of what we have written."""

from __future__ import annotations

from hypothesis import strategies as st

# In the place of any value of a manifest.
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([
        "../outside/covariance-00000.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "C:\\x",
        "covariance-00000.safetensors", "float99", "load", "quint8", "int8", "bfloat16", -1, 2**70,
        1e400, [], {}, [[]], [-1], [2**40, 2**40], {"": {}}, "self", "\ud800"]),
    st.lists(st.integers(-2, 9), max_size=3),
)


def places(value, path=()):
    """Every place of a JSON value, as the keys that lead there."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else (
            enumerate(value) if isinstance(value, list) else ()):
        yield from places(item, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


# In the place of a whole file.
WHOLE = [b"", b"null", b"[]", b"{}", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000,
         b'{"kind": 1, "kind": 2}', b"a: &a [*a]", b"a: 2001-99-99", b"---\ntags: 7\n---\n",
         b"---\nbase_model: {a: b}\ndatasets: 5\n---\nx", b"---\n[1]\n---\nx", b"---\nx: [\n---\n"]
