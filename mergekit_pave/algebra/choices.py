"""Words that options offer, here where naming them imports nothing."""

# How EMR weighs the tensors of a task: each alike, or by size.
RESCALERS = ("tensor_mean", "global")
# What compressed fine-tunes keep their singular vectors in.
DTYPES = ("float32", "bfloat16", "float16")
