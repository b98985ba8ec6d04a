"""What each operator is to an attention audit: a fused call, an opaque one, or a part of attention written by hand."""

from __future__ import annotations

import enum
import functools
import re
from typing import Any


class Kind(enum.Enum):
    """Of an operator."""

    FUSED = enum.auto()
    FUSED_BACKWARD = enum.auto()
    UNFUSED = enum.auto()  # one operator that materialises the scores
    OPAQUE = enum.auto()  # attention of which nothing is known
    PRODUCT = enum.auto()  # batched, of two activations
    LINEAR = enum.auto()  # a product that mostly is one with weights
    SOFTMAX = enum.auto()
    EXP = enum.auto()
    SOFTMAX_BACKWARD = enum.auto()
    COMPOSITE = enum.auto()  # made of operators, which inference mode hides
    ENDS = enum.auto()  # what comes out is no score any more
    CARRIES = enum.auto()  # anything else: scores stay scores


_FUSED = re.compile(
    r"aten::_scaled_dot_product_(flash|efficient|cudnn|fused)_attention"
    r"|aten::_(flash|efficient|cudnn)_attention_(forward|backward)"
    r"|torch_attn::_varlen_attn"
    r"|genkit::attend_"
)
# Of packages whose kernels are known to be fused.
_KNOWN = re.compile(
    r"(xformers|mslk|fbgemm|flash_attn|sageattention|_diffusers_)\w*::\w*(attn|attention|fmha|flash|mha_)", re.IGNORECASE
)
_OPAQUE = re.compile(
    r"aten::(_native_multi_head_attention|_transformer_encoder_layer_fwd|_triton_\w*attention|\w*attention_math_for_mps)"
    r"|(?!aten::|prim::)\w+::\w*(attn|attention|fmha|flash_|mha_)",
    re.IGNORECASE,
)
_BACKWARD = re.compile(r"backward|bwd", re.IGNORECASE)
_NAMES = {
    Kind.PRODUCT: ("bmm", "baddbmm", "addbmm"),
    Kind.LINEAR: ("mm", "addmm", "linear"),
    Kind.SOFTMAX: ("_softmax", "_safe_softmax", "_masked_softmax"),
    Kind.EXP: ("exp", "exp_", "exp2", "exp2_"),
    Kind.SOFTMAX_BACKWARD: ("_softmax_backward_data", "_masked_softmax_backward"),
    Kind.COMPOSITE: ("scaled_dot_product_attention", "_scaled_dot_product_attention_math", "matmul", "einsum", "softmax"),
    Kind.ENDS: (
        *("sum", "mean", "amax", "amin", "max", "min", "argmax", "topk", "var_mean", "std", "logsumexp"),
        *("convolution", "embedding", "native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"),
    ),
}
_BY_NAME = {f"aten::{name}": kind for kind, names in _NAMES.items() for name in names}


@functools.cache
def kind_of(operator: Any) -> Kind:
    """The kind of an operator, an `OpOverload` or a higher-order one."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        name = str(operator)
        return Kind.UNFUSED if "flex_attention" in name else Kind.OPAQUE if "attention" in name or "attn" in name else Kind.CARRIES
    if _FUSED.match(schema.name) or _KNOWN.match(schema.name):
        return Kind.FUSED_BACKWARD if _BACKWARD.search(schema.name) else Kind.FUSED
    if _OPAQUE.match(schema.name):
        return Kind.OPAQUE
    return _BY_NAME.get(schema.name, Kind.CARRIES)


def short_name(operator: Any) -> str:
    """The operator's name for tables: "flash_attention_for_cpu"."""
    name = getattr(getattr(operator, "_schema", None), "name", str(operator)).rpartition("::")[2]
    return name.removeprefix("_scaled_dot_product_").removeprefix("_")
