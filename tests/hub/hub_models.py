"""Models of KerasHub, built tiny from their configurations, and something to train each on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np

models = keras_hub.models

VOCABULARY, TOKENS, PIXELS, CLASSES, BATCH = 13, 6, 16, 3, 4


class Journey(NamedTuple):
    """A model, a batch, and the loss of its task."""

    model: keras.Model
    x: Any
    y: np.ndarray
    loss: keras.losses.Loss


def _cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _integers(high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, (BATCH, *shape)).astype("int32")


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, *shape)).astype("float32")


def _tokens(**more: Any) -> dict[str, np.ndarray]:
    mask = np.ones((BATCH, TOKENS), "int32")
    mask[0, -2:] = 0
    return {"token_ids": _integers(VOCABULARY, TOKENS), "padding_mask": mask, **more}


def _bert() -> Any:
    return models.BertBackbone(
        vocabulary_size=VOCABULARY, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
        dropout=0.0, max_sequence_length=TOKENS,
    )  # fmt: skip


def bert() -> Journey:
    model = models.BertTextClassifier(_bert(), num_classes=CLASSES, dropout=0.0)
    x = _tokens(segment_ids=_integers(2, TOKENS))
    return Journey(model, x, _integers(CLASSES), _cross_entropy())


def bert_masked() -> Journey:
    x = _tokens(segment_ids=_integers(2, TOKENS), mask_positions=_integers(TOKENS, 2))
    model = models.BertMaskedLM(_bert())
    return Journey(model, x, _integers(VOCABULARY, 2), _cross_entropy())


def gpt2() -> Journey:
    backbone = models.GPT2Backbone(
        vocabulary_size=VOCABULARY, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
        dropout=0.0, max_sequence_length=TOKENS,
    )  # fmt: skip
    x = _tokens()
    return Journey(
        models.GPT2CausalLM(backbone), x, np.roll(x["token_ids"], -1, 1), _cross_entropy()
    )


def gemma() -> Journey:
    backbone = models.GemmaBackbone(
        vocabulary_size=VOCABULARY, num_layers=1, num_query_heads=2, num_key_value_heads=1,
        hidden_dim=8, intermediate_dim=16, head_dim=4, final_logit_soft_cap=30.0,
    )  # fmt: skip
    x = _tokens()
    return Journey(
        models.GemmaCausalLM(backbone=backbone), x, np.roll(x["token_ids"], -1, 1), _cross_entropy()
    )


def vit() -> Journey:
    backbone = models.ViTBackbone(
        image_shape=(PIXELS, PIXELS, 3), patch_size=8, num_layers=1, num_heads=2, hidden_dim=8,
        mlp_dim=16,
    )  # fmt: skip
    model = models.ViTImageClassifier(backbone, num_classes=CLASSES, activation=None)
    return Journey(model, _numbers(PIXELS, PIXELS, 3), _integers(CLASSES), _cross_entropy())


def _resnet() -> Any:
    return models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 8],
        stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block",
        image_shape=(PIXELS, PIXELS, 3),
    )  # fmt: skip


def resnet() -> Journey:
    model = models.ResNetImageClassifier(_resnet(), num_classes=CLASSES)
    return Journey(model, _numbers(PIXELS, PIXELS, 3), _integers(CLASSES), _cross_entropy())


def mobilenet() -> Journey:
    backbone = models.MobileNetBackbone(
        stackwise_expansion=[[16]], stackwise_num_blocks=[1], stackwise_num_filters=[[16]],
        stackwise_kernel_size=[[3]], stackwise_num_strides=[[1]], stackwise_se_ratio=[[0.25]],
        stackwise_activation=[["relu"]], stackwise_padding=[[1]], output_num_filters=16,
        depthwise_filters=8, depthwise_stride=2, depthwise_residual=False, last_layer_filter=16,
        squeeze_and_excite=0.5, image_shape=(PIXELS, PIXELS, 3), input_num_filters=8,
    )  # fmt: skip
    model = models.MobileNetImageClassifier(backbone, num_classes=CLASSES)
    return Journey(model, _numbers(PIXELS, PIXELS, 3), _integers(CLASSES), _cross_entropy())


def deeplab() -> Journey:
    backbone = models.DeepLabV3Backbone(
        image_encoder=_resnet(), spatial_pyramid_pooling_key="P3", low_level_feature_key="P2",
        upsampling_size=2, dilation_rates=[2], projection_filters=4,
        image_shape=(PIXELS, PIXELS, 3),
    )  # fmt: skip
    model = models.DeepLabV3ImageSegmenter(backbone, num_classes=CLASSES)
    return Journey(
        model, _numbers(PIXELS, PIXELS, 3), _integers(CLASSES, PIXELS, PIXELS), _cross_entropy()
    )


def segformer() -> Journey:
    encoder = models.MiTBackbone(
        layerwise_depths=[1, 1], num_layers=2, layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1], max_drop_path_rate=0.0, layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2], hidden_dims=[8, 16], image_shape=(PIXELS, PIXELS, 3),
    )  # fmt: skip
    backbone = models.SegFormerBackbone(encoder, projection_filters=8)
    model = models.SegFormerImageSegmenter(backbone, num_classes=CLASSES)
    return Journey(
        model, _numbers(PIXELS, PIXELS, 3), _integers(CLASSES, PIXELS, PIXELS), _cross_entropy()
    )


def mmdit() -> Journey:
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    model = MMDiT(
        patch_size=2, hidden_dim=8, num_layers=1, num_heads=2, position_size=8, qk_norm="rms_norm",
        latent_shape=(4, 4, 4), context_shape=(5, 8), pooled_projection_shape=(6,),
    )  # fmt: skip
    x = {
        "latent": _numbers(4, 4, 4),
        "context": _numbers(5, 8),
        "pooled_projection": _numbers(6),
        "timestep": np.linspace(0, 9, BATCH)[:, None].astype("float32"),
    }
    return Journey(model, x, _numbers(4, 4, 4), keras.losses.MeanSquaredError())


MAKERS: dict[str, Callable[[], Journey]] = {
    make.__name__: make
    for make in (bert, bert_masked, gpt2, gemma, vit, resnet, mobilenet, deeplab, segformer, mmdit)
}
