"""Networks of transformers with few, small layers and random weights."""

import torch
import transformers as hf

from bpkd_sdk.models.mask_classification import MaskClassificationNetwork

_STAGES = {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_SWIN = {"image_size": 64, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2} | _STAGES
_VIT = {"image_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "layer_type": "basic"} | _STAGES
_LABELS = {"num_labels": 9}


def segformer():
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    strides = {"num_encoder_blocks": 2, "strides": [4, 2], "patch_sizes": [7, 3], "sr_ratios": [8, 4]}
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(**sizes, **strides, decoder_hidden_size=16, **_LABELS)
    )


def upernet():
    backbone = hf.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], **_STAGES)
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8}
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **sizes, **_LABELS))


def beit():
    sizes = {"patch_size": 16, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8}
    return hf.BeitForSemanticSegmentation(hf.BeitConfig(**_VIT, **sizes, **_LABELS))


def dpt():
    sizes = {"patch_size": 16, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
    return hf.DPTForSemanticSegmentation(hf.DPTConfig(**_VIT, **sizes, fusion_hidden_size=16, **_LABELS))


def maskformer():
    decoder = hf.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    )  # fmt: skip
    config = hf.MaskFormerConfig(
        backbone_config=hf.SwinConfig(**_SWIN),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        **_LABELS,
    )
    return hf.MaskFormerForInstanceSegmentation(config)


def mask2former():
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2, "num_queries": 5}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    config = hf.Mask2FormerConfig(backbone_config=hf.ResNetConfig(**_RESNET), **sizes, **layers, **_LABELS)
    return hf.Mask2FormerForUniversalSegmentation(config)


def oneformer():
    config = hf.OneFormerConfig(
        backbone_config=hf.ResNetConfig(**_RESNET), num_queries=5, conv_dim=32, mask_dim=32, hidden_dim=32, encoder_layers=1,
        decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16, num_attention_heads=2, task_seq_len=8,
        text_encoder_width=16, text_encoder_context_length=8, text_encoder_vocab_size=50, query_dec_layers=1,
        **_LABELS,
    )  # fmt: skip
    return hf.OneFormerForUniversalSegmentation(config)


def eomt():
    sizes = {"patch_size": 16, "num_blocks": 2, "num_upscale_blocks": 2, "num_queries": 5}
    return hf.EomtForUniversalSegmentation(hf.EomtConfig(**_VIT, **sizes, **_LABELS))


NETWORKS = {
    build.__name__: build for build in (segformer, upernet, beit, dpt, maskformer, mask2former, oneformer, eomt)
}


TASK = torch.arange(8)[None]  # tokens of OneFormer's task


def build(name):
    """Build a network; OneFormer with the tokens of its task, without which it does not run."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    return MaskClassificationNetwork(network, TASK) if name == "oneformer" else network
