"""The backbone of `locret train`: as stored, quantised, spread over devices, or split over torchrun's processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from locret.errors import ConfigError, unknown

if TYPE_CHECKING:
    from locret.backbone import Backbone

QUANTIZERS = ("bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4", "quanto-int8", "quanto-int4")
PARALLEL = ("data", "tensor", "fsdp")


def load_backbone(run: dict[str, Any]) -> Backbone:
    """`Backbone.load` for the keys model, device, dtype, quantize, device_map, parallel; under torchrun on this
    process's GPU.

    Raises: ConfigError: unknown names, choices that exclude each other, a package that is missing.
    """
    from locret.backbone import Backbone
    from locret.parallel import local_device, shard_weights

    how = run.get("parallel") or "data"
    if how not in PARALLEL:
        raise unknown("parallel", how, PARALLEL)
    options: dict[str, Any] = {}
    if run.get("quantize") is not None:
        options["quantization_config"] = _quantizer(run["quantize"])
    if run.get("device_map") is not None:
        options["device_map"] = run["device_map"]
    if how != "data" and options:
        raise ConfigError(f"parallel {how!r} splits plain weights; leave out --quantize and --device-map")
    device, dtype = run.get("device") or local_device() or "auto", run.get("dtype") or "auto"
    if how == "fsdp" and device != "cpu":  # a layer goes to the GPU when it is cut: never the whole model
        dtype = "bfloat16" if dtype == "auto" and local_device() else dtype
        device = "cpu"
    if how == "tensor":
        options["tp_plan"] = "auto"
    backbone = Backbone.load(run.get("model"), device=device, dtype=dtype, options=options)
    if how == "fsdp":
        shard_weights(backbone.model, backbone.decoder_layers)
    return backbone


def _quantizer(name: str) -> Any:
    import transformers

    if name not in QUANTIZERS:
        raise unknown("quantize", name, QUANTIZERS)
    library, _, width = name.partition("-")
    try:
        if library == "bnb":
            bits = {"4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}
            return transformers.BitsAndBytesConfig(**bits.get(width, {"load_in_8bit": True}))
        if library == "quanto":
            return transformers.QuantoConfig(weights=width)
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig() if width == "int8" else Int4WeightOnlyConfig())
    except ImportError as error:
        package = {"bnb": "bitsandbytes", "quanto": "optimum-quanto"}.get(library, library)
        raise ConfigError(f"--quantize {name} needs the package {package}: pip install {package}") from error
