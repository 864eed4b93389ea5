"""What all methods of ours do while mergekit plans a merge, before it comes to single tensors."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import GroupMergeMethod

from mergekit_pave.calibration.model import empty_model, linear_layers
from mergekit_pave.errors import PaveError
from mergekit_pave.locate import LoaderOptions

# What mergekit's planner calls a run of layers.
_WHOLE_SLICE = re.compile(r"\.slices\[\d+\]$")


class PlannedMethod(GroupMergeMethod):
    """A merge method that refuses checkpoints of which mergekit would merge only a part."""

    def validate_inputs(self, input_ids, base_id=None, *, group_name=None) -> None:
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name and _WHOLE_SLICE.search(group_name):
            # The planning thread is the only one that knows them.
            options = LoaderOptions.of_this_thread()
            refuse_old_names(input_ids, options)
            self.prepare(options)

    def prepare(self, options: LoaderOptions) -> None:
        """Take over mergekit's loading options, if the method loads anything itself."""


def refuse_old_names(models: Iterable[Hashable], options: LoaderOptions) -> None:
    """Refuse checkpoints that mergekit would cut down.

    Where it has no definition of an architecture it takes the tensor names of today's
    transformers and skips, without a word, those that the checkpoint calls otherwise.

    Raises:
        PaveError: linear layers of a model would be missing from the merge.
    """
    for model in models:
        if not isinstance(model, ModelReference):
            continue
        config = model.config(trust_remote_code=options.trust_remote_code)
        if arch_info_for_config(config) is not None:
            continue
        there = LoaderCache().get(model).index.tensor_paths
        layers = linear_layers(empty_model(config, options.trust_remote_code)).modules
        missing = [name for name in layers if name not in there]
        if missing:
            raise PaveError(
                f"mergekit would leave {len(missing)} weights of {model} out of the merge "
                f"(such as {missing[0]}): its checkpoint has the names of an older "
                "transformers; load the model and save it again with "
                "save_pretrained(DIR, save_original_format=False)."
            )
