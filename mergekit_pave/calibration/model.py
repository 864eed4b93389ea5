"""Loading a model for calibration, and naming the linear layers that can be purified."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from mergekit.common import get_auto_cls
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_pave.errors import PaveError
from mergekit_pave.fingerprint import digest

logger = logging.getLogger(__name__)

_INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
               "id2label", "label2id"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}


@dataclass(frozen=True)
class ModelSource:
    """Where one model's weights and its tokenizer come from.

    Attributes:
        path: local folder with the weights (a LoRA is already merged into them).
        label: name for messages and manifests: a Hub id, or a folder's own name.
        tokenizer: folder or Hub id of its tokenizer or processor.
        revision: of the tokenizer, when it comes from the Hub.
        trust_remote_code: only what the user's own flag said.
    """

    path: str
    label: str
    tokenizer: str
    revision: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None

    def config(self) -> PretrainedConfig:
        return transformers.AutoConfig.from_pretrained(
            self.path, trust_remote_code=self.trust_remote_code
        )

    def identity(self) -> str:
        """sha256 of what a forward pass depends on: the weights, and the config's settings."""
        settings = json.dumps(_settings(self.config().to_diff_dict()), sort_keys=True, default=str)
        return hashlib.sha256(f"{digest(self.tensors())}|{settings}".encode()).hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every checkpoint tensor, shard by shard, without loading the model."""
        index = ShardedTensorIndex.from_disk(self.path)
        loader = LazyTensorLoader(index, lazy_unpickle=False)
        for shard in index.shards:
            for name in sorted(shard.contained_keys):
                yield name, loader.get_tensor(name)


def _settings(value: Any) -> Any:
    """A config, or one inside it, without what changes no number."""
    if not isinstance(value, dict):
        return value
    return {key: _settings(item) for key, item in value.items() if key not in _INCIDENTAL}


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model: weight name -> module, and why others are left out."""

    modules: dict[str, nn.Module]
    skipped: dict[str, str]


def warn_of_unseen(model: str, skipped: Mapping[str, str]) -> None:
    """Of weights that a user takes for those of linear layers, and that have no covariance."""
    unseen = [name for name, reason in skipped.items() if reason.startswith(("its", "fused"))]
    if unseen:
        logger.warning(
            "%s: %d weights cannot be purified and keep the plain task vector, e.g. %s (%s).",
            model, len(unseen), unseen[0], skipped[unseen[0]],
        )


def linear_layers(model: PreTrainedModel) -> LinearLayers:
    """Split a model's linear layers into those to purify and those with a reason not to."""
    modules, skipped = {}, {}
    embedded = {id(p) for m in _vocabulary_modules(model) for p in m.parameters()}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if id(module.weight) in embedded:
            reason = "vocabulary layer"
        elif _in_head(model, name):
            reason = "task head"
        elif name.rpartition(".")[2] in _ROUTERS:
            reason = "router"
        else:
            modules[f"{name}.weight"] = module
            continue
        skipped[f"{name}.weight"] = reason
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            skipped[name] = "fused experts: their inputs cannot be observed one by one"
    return LinearLayers(modules, skipped)


def _vocabulary_modules(model: PreTrainedModel) -> list[nn.Module]:
    found = []
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = getter()
        except (NotImplementedError, AttributeError):
            continue
        # A vision model's "input embeddings" are its patch projection.
        if isinstance(module, (nn.Embedding, nn.Linear)):
            found.append(module)
    return found


def _in_head(model: PreTrainedModel, name: str) -> bool:
    body = model.base_model
    if body is model:
        return False
    return not name.startswith(model.base_model_prefix + ".")


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` keeps its weight as `(in, out)`."""
    return isinstance(module, Conv1D)


def model_class(config: PretrainedConfig) -> Any:
    """The class named in the checkpoint's config, as mergekit would choose it."""
    architectures = getattr(config, "architectures", None) or []
    if not architectures:
        return transformers.AutoModel
    own = getattr(transformers, architectures[0], None)
    return own if own is not None else get_auto_cls(architectures[0])


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config without weights (on the `meta` device), to list its layers."""
    from accelerate import init_empty_weights

    cls = model_class(config)
    with init_empty_weights():
        if hasattr(cls, "from_config"):
            return cls.from_config(config, trust_remote_code=trust_remote_code)
        return cls(config)


def load_model(
    source: ModelSource,
    *,
    device: torch.device,
    max_memory: int | None = None,
    scratch: Path | None = None,
) -> PreTrainedModel:
    """Load for forward passes only, placed by accelerate; weights may stay in their shards.

    Args:
        source: the model.
        device: `cpu`, an accelerator (`cuda:1`), or a kind of them, of which all are used.
        max_memory: bytes of weights to hold in main memory; the rest is read from the
            shards as it is needed. By default what is free, less a reserve.
        scratch: folder for a copy of those weights that cannot be read from their shards:
            of pickled checkpoints, and those that transformers rearranges (experts).

    Raises:
        PaveError: the checkpoint is quantised, or transformers cannot load it.
    """
    config = source.config()
    refuse_quantised(config, source.label)
    dtype = _compute_dtype(config, device)
    size = _checkpoint_bytes(source.path, config)
    room = max_memory if max_memory is not None else int(psutil.virtual_memory().available * 0.7)
    placement: dict[str, Any] = {}
    if device.type != "cpu":
        placement = {"device_map": "auto", "max_memory": _accelerator_memory(device, room)}
    elif size > room:
        placement = {"device_map": "auto", "max_memory": {"cpu": room}}
    if placement and scratch is not None:
        placement["offload_folder"] = str(scratch)
    cls = model_class(config)
    extra = {} if not source.trust_remote_code else {"trust_remote_code": True}
    try:
        model, info = cls.from_pretrained(
            source.path, config=config, dtype=dtype, output_loading_info=True, **placement, **extra
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise PaveError(f"Cannot load {source.label} for calibration: {error}") from error
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        logger.warning(
            "%s has no weights for %s of the tensors of %s (%s, ...): they start at random.",
            source.label, len(missing), type(model).__name__, missing[0],
        )
    model.eval()
    return model


def refuse_quantised(config: PretrainedConfig, label: str) -> None:
    """Raise `PaveError` for a checkpoint whose weights are not plain floating point."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        get = quantised.get if isinstance(quantised, dict) else lambda k: getattr(quantised, k, "")
        raise PaveError(
            f"{label} is quantised ({get('quant_method') or 'quantization_config'}): merging "
            "needs full-precision weights; name the checkpoint it was quantised from."
        )


def _compute_dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """float32 on CPU; on an accelerator the checkpoint's own, float16 as bfloat16.

    float16 overflows in the activations of several model families.
    """
    if device.type == "cpu":
        return torch.float32
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype in (None, torch.float64):
        return torch.float32
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _accelerator_memory(device: torch.device, room: int) -> dict[int | str, int]:
    # Statistics, activations and the workspace of their products share the card.
    module = torch.get_device_module(device)
    indices = range(module.device_count()) if device.index is None else [device.index]
    limits: dict[int | str, int] = {
        index: int(module.mem_get_info(index)[0] * 0.5) for index in indices
    }
    return {**limits, "cpu": room}


def _checkpoint_bytes(path: str, config: PretrainedConfig) -> int:
    """Bytes of the weights when held as float32, from the sizes of the shards."""
    folder = Path(path)
    index = ShardedTensorIndex.from_disk(path)
    size = sum((folder / shard.filename).stat().st_size for shard in index.shards)
    half = str(getattr(config, "dtype", "")).endswith("16")
    return size * (2 if half else 1)
