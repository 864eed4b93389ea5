"""Values of options, in a module that imports nothing, so that help texts are quick."""

# EMR's factor of a task weighs its tensors alike, or by size.
RESCALERS = ("tensor_mean", "global")
# Dtypes of the singular vectors of compressed fine-tunes.
DTYPES = ("float32", "bfloat16", "float16")
