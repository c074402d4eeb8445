"""Load, save and train quantized checkpoints through transformers 5.

Two methods: "aqlm", the published AQLM format, and "aqlm_infer", our own block for everything else.
Importing this module imports transformers' quantizer table, and puts our quantizers into it, for
"aqlm" in the place of the stock one; ``unregister`` takes them out. Which modules of an AQLM model
are quantized, and how, is read from the headers of the checkpoint, never from the exclusion list of
its config.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import CheckpointError, StoredLayer, read_headers
from ..checkpoint.config import method_fields
from ..checkpoint.own import METHOD as OWN_METHOD
from ..layers import FusedPart, QuantLinear, quantized_layers, share_rotations
from . import stop_watching
from .moe import QuantExperts
from .placement import (
    block_layers,
    header_layers,
    linear_slots,
    listed_layers,
    refuse_tied,
    replace_modules,
)
from .requirements import LOADS, too_old

METHOD = "aqlm"


class AqlmInferQuantizer(HfQuantizer):
    """Loads checkpoints in the published AQLM format into ``QuantLinear`` layers.

    Loading raises CheckpointError or FormatError naming tensor and values, and returns no model,
    when the files are corrupt or disagree with each other or with the model.
    """

    requires_calibration = True
    replaces: type | None = None
    """The class that this one was registered over."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._transposed: frozenset[str] = frozenset()
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args, **kwargs) -> None:
        if reason := too_old(LOADS):
            raise ImportError(f"loading a quantized checkpoint with aqlm_infer {reason}")

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        slots = linear_slots(model)
        headers = read_headers(checkpoint_files) if checkpoint_files else None
        layers = self._find_layers(model, headers, slots)
        if not layers:
            source = checkpoint_files[0] if checkpoint_files else "the state dict"
            raise CheckpointError(
                f"quant_method is {METHOD!r}, but {source} has no quantized tensor of any of the"
                f" {len(slots)} linear layers of {type(model).__name__}"
            )
        refuse_tied(model, layers)
        replace_modules(model, layers)
        self._transposed = frozenset(path for path, layer in layers.items() if layer.transposed)
        self._dtypes = {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}
        return model

    def _find_layers(self, model, headers, slots) -> dict[str, StoredLayer]:
        """The layers to replace, by module path; ``headers`` None for loads from memory."""
        if headers is None:
            return listed_layers(model, self.quantization_config, slots)
        return header_layers(model, headers, slots)

    def _process_model_after_weight_loading(self, model, **kwargs):
        _require_loaded(model)
        _convert(model, self._dtypes)
        for name, layer in quantized_layers(model):
            if name in self._transposed:
                codes = layer.codes.transpose(0, 1).contiguous()
                layer.codes = nn.Parameter(codes, requires_grad=False)
            layer.freeze()
            layer.prepare(name)
        share_rotations(model)
        self._transposed, self._dtypes = frozenset(), {}
        # What the tensors say wins over what the config said: a later save describes them truly.
        fields = method_fields(model)
        fields.pop("quant_method")
        self.quantization_config.__dict__.update(fields)
        return model

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        """Swap every quantized layer for a dense one with its dequantized weight, in place."""
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantExperts):
                model.set_submodule(name, module.to_fused(model.config.get_text_config(), dtype))
                # The renamings recorded at load are those of separate experts.
                model._weight_conversions = None
        fused = {}
        for name, part in list(model.named_modules()):
            if isinstance(part, FusedPart):
                fused.setdefault(part.fused, []).append((name, part))
        for name, layer in list(quantized_layers(model)):
            if layer not in fused:
                model.set_submodule(name, _dense(layer, layer.weight, layer.bias, dtype))
                continue
            weight, bias = layer.weight, layer.bias
            for part_name, part in fused[layer]:
                rows = part.rows
                part_bias = None if bias is None else bias[rows]
                model.set_submodule(part_name, _dense(part, weight[rows], part_bias, dtype))
            block, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(block), leaf)
        return model


class OwnConfig(QuantizationConfigMixin):
    """The block of our own method: see ``checkpoint.own``."""

    def __init__(self, version=None, layers=None, rotations=None, **kwargs):
        self.quant_method = OWN_METHOD
        self.version, self.layers, self.rotations = version, layers, rotations


class OwnQuantizer(AqlmInferQuantizer):
    """Loads checkpoints of any mixture of our formats, as their config block lists them."""

    def _find_layers(self, model, headers, slots) -> dict[str, StoredLayer]:
        return block_layers(model, self.quantization_config.to_dict(), headers, slots)


def _require_loaded(model: nn.Module) -> None:
    """Raise CheckpointError for a quantized layer that the loader left incomplete or elsewhere.

    Likewise for a layer of which the file holds nothing at all, when its like are quantized: the
    loader would only report it, and initialise it at random.
    """
    quantized = (QuantLinear, QuantExperts)
    kinds = {_kind(p) for p, m in model.named_modules() if isinstance(m, quantized)}
    for path, module in model.named_modules():
        if _kind(path) not in kinds:
            continue
        for tensor, value in module.named_parameters(recurse=False):
            if value.is_meta:
                raise CheckpointError(
                    f"{path}.{tensor} was offloaded (device_map): quantized layers cannot be"
                )
            # The loader's own mark of a tensor that came from the checkpoint.
            if not getattr(value, "_is_hf_initialized", False):
                raise CheckpointError(f"{path}: neither codes nor {tensor} are in the checkpoint")


def _convert(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters the dtype that they had before loading.

    transformers 5.17 (5.23 does not) leaves a renamed tensor of a quantized checkpoint, such as
    Mixtral's router, in the dtype that it is stored in.
    """
    plans = (getattr(model, f"_keep_in_fp32_modules{end}", None) for end in ("", "_strict"))
    kept = [part for plan in plans for part in plan or ()]
    for name, value in model.named_parameters():
        wanted = dtypes.get(name, value.dtype)
        raised = value.dtype == torch.float32 and any(part in name for part in kept)
        if value.dtype != wanted and not raised:
            value.data = value.data.to(wanted)


def _kind(path: str) -> str:
    """The path with its layer and expert numbers blanked: what all layers of a kind share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _dense(layer: nn.Module, weight, bias, dtype: torch.dtype) -> nn.Linear:
    N, K = weight.shape
    dense = nn.Linear(K, N, bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.detach().to(dtype).contiguous())
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return dense.train(layer.training)


class LegacyLlamaConfig(PreTrainedConfig):
    """Stands for configs from before transformers knew AQLM, to say what to do with them."""

    model_type = "llama_aqlm"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        raise CheckpointError(
            f"model_type {cls.model_type!r} is the legacy AQLM layout: convert the folder with"
            " aqlm_infer.checkpoint.convert_legacy(folder, out_dir) or `aqlm-infer convert`, and"
            " load out_dir"
        )


def register() -> None:
    """Put our two methods into transformers' tables; calling it again changes nothing."""
    current = auto.AUTO_QUANTIZER_MAPPING.get(METHOD)
    if current is not AqlmInferQuantizer:
        # After a reload of this module, ``current`` is our own earlier class.
        AqlmInferQuantizer.replaces = getattr(current, "replaces", current)
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = AqlmInferQuantizer
    auto.AUTO_QUANTIZER_MAPPING[OWN_METHOD] = OwnQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[OWN_METHOD] = OwnConfig
    CONFIG_MAPPING.register(LegacyLlamaConfig.model_type, LegacyLlamaConfig, exist_ok=True)


def unregister() -> None:
    """Give "aqlm" back to the class that had it, and stop watching for imports of transformers."""
    stop_watching()
    auto.AUTO_QUANTIZER_MAPPING.pop(OWN_METHOD, None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(OWN_METHOD, None)
    CONFIG_MAPPING._extra_content.pop(LegacyLlamaConfig.model_type, None)
    if auto.AUTO_QUANTIZER_MAPPING.get(METHOD) is AqlmInferQuantizer:
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = AqlmInferQuantizer.replaces
    AqlmInferQuantizer.replaces = None


register()
