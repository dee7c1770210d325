"""The layers in fewer kernels give what transformers' modules give, or are not used at all."""

import pytest
import torch
from conftest import FAMILIES, build_tiny_model

from locret.backbone import Backbone
from locret.fused import _Blend, recognise

FUSED = {
    "llama",
    "llama-plain",
    "llama-dynamic",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen3",
    "phi3",
    "phi3-longrope",
    "granite",
    "glm",
    "yarn",
    "smollm3",
}  # granite's multipliers are 1 in the tiny model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recognised_family_gives_the_modules_logits(family):
    backbone = Backbone(build_tiny_model(family))
    fused = recognise(backbone)
    assert (fused is not None) == (family in FUSED)
    if fused is None:
        return
    ids = torch.arange(5, 42).reshape(1, -1).repeat(2, 1)
    for logits in (1, 7):
        with torch.inference_mode():
            mine, theirs = fused.run(ids, _Blend(), logits=logits), backbone.run_modules(ids, _Blend(), logits=logits)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_only_looks_like_the_shape_is_left_to_transformers():
    """Granite with a residual multiplier has the same modules; only running both ways tells."""
    model = build_tiny_model("granite")
    for layer in model.model.layers:
        layer.residual_multiplier = 0.5
    assert recognise(Backbone(model)) is None


def test_hooks_and_other_linear_classes_are_left_to_transformers():
    class Adapted(torch.nn.Linear):
        pass

    model = build_tiny_model("llama")
    model.model.layers[1].mlp.up_proj.__class__ = Adapted
    assert recognise(Backbone(model)) is None
    model = build_tiny_model("llama")
    model.model.layers[0]._hf_hook = object()
    assert recognise(Backbone(model)) is None
