"""The same T5 in Hugging Face's PyTorch implementation; `pytest.importorskip` torch first."""

import numpy as np
import torch
import transformers

from robust_ft.checkpoints_io import hf_t5
from robust_ft.trainable import flatten

ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def hugging_face_t5(config, params):
    """Returns a float32 T5ForConditionalGeneration in eval mode with these parameters."""
    torch.set_num_threads(1)
    tied = config.logits_via_embedding
    settings = transformers.T5Config.from_dict(hf_t5.config_to_hf(config))
    model = transformers.T5ForConditionalGeneration(settings).eval()
    assert model.config.scale_decoder_outputs == tied
    if not tied:
        # transformers 5 ties the head of every T5 that is made from a config.
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert (model.lm_head.weight is model.shared.weight) == tied
    named = dict(model.named_parameters())
    for path, value in flatten(params).items():
        with torch.no_grad():
            named.pop(hugging_face_name(path)).copy_(torch.from_numpy(to_torch(path, value)))
    assert not named, f"left at their initial values: {list(named)}"
    return model


def hugging_face_name(path):
    """Returns the name in PyTorch of the parameter at t5x's path."""
    match path.split("/"):
        case ["token_embedder", "embedding"]:
            return "shared.weight"
        case ["decoder", "logits_dense", "kernel"]:
            return "lm_head.weight"
        case [stack, "relpos_bias", _]:
            return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        case [stack, "encoder_norm" | "decoder_norm", _]:
            return f"{stack}.final_layer_norm.weight"
        case [stack, layer, *rest]:
            block = f"{stack}.block.{layer.removeprefix('layers_')}.layer"
            last = 1 if stack == "encoder" else 2
    match rest:
        case ["attention" | "self_attention", name, _]:
            return f"{block}.0.SelfAttention.{ATTENTION[name]}.weight"
        case ["encoder_decoder_attention", name, _]:
            return f"{block}.1.EncDecAttention.{ATTENTION[name]}.weight"
        case ["mlp", name, _]:
            return f"{block}.{last}.DenseReluDense.{name}.weight"
        case ["pre_attention_layer_norm" | "pre_self_attention_layer_norm", _]:
            return f"{block}.0.layer_norm.weight"
        case ["pre_cross_attention_layer_norm", _]:
            return f"{block}.1.layer_norm.weight"
        case ["pre_mlp_layer_norm", _]:
            return f"{block}.{last}.layer_norm.weight"
    raise KeyError(path)


def to_torch(path, value):
    """PyTorch keeps linear layers and the relative position table transposed."""
    value = np.array(value, np.float32)
    return value.T.copy() if path.endswith(("/kernel", "/rel_embedding")) else value


def hugging_face_logits(model, batch, **inputs):
    """Returns float32 logits of a batch with t5x's names; `inputs` replaces the encoder's input."""
    tokens = torch.from_numpy(np.asarray(batch["encoder_input_tokens"], np.int64))
    mask = torch.from_numpy(np.asarray(batch["encoder_input_mask"], np.int64))
    inputs = inputs or {"input_ids": tokens, "attention_mask": mask}
    targets = torch.from_numpy(np.asarray(batch["decoder_input_tokens"], np.int64))
    return model(decoder_input_ids=targets, use_cache=False, **inputs).logits
