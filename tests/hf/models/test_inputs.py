"""Inputs other than token ids: a batch is shortened consistently or not at all."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from helpers.driver_models import VOCABULARY, padded_batches, tokens

import ptqkit
from ptqkit.errors import CalibrationError
from ptqkit.hf.models.inputs import short_batch
from ptqkit.nn.forward import model_inputs

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_VISION = {**_SIZES, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_TEXT = {**_SIZES, "num_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0}
_IMAGE, _PATCHES = 3, 16


def vit():
    return T.ViTForImageClassification(T.ViTConfig(**_VISION, num_labels=5))


def whisper():
    sizes = {"d_model": 32, "max_source_positions": 20, "num_mel_bins": 8}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = T.WhisperConfig(**sizes, **ids, **none, vocab_size=VOCABULARY)
    return T.WhisperForConditionalGeneration(config)


def llava():
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**_VISION),
        text_config=T.LlamaConfig(**_TEXT),
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
    )
    return T.LlavaForConditionalGeneration(config)


def clip():
    text = {**_TEXT, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16))


def sound():
    shape = {
        "conv_dim": (8,),
        "conv_kernel": (10,),
        "conv_stride": (5,),
        "num_feat_extract_layers": 1,
    }
    sizes = {**_SIZES, "num_attention_heads": 4, "num_conv_pos_embeddings": 4}
    return T.Wav2Vec2Model(T.Wav2Vec2Config(**sizes, **shape, mask_time_prob=0.0))


def images(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def prompt(at, seed=0):
    """A prompt of 40 tokens with an image at a place of its own."""
    ids = tokens(1, 40, seed).clamp(min=_IMAGE + 1)
    ids[0, at : at + _PATCHES] = _IMAGE
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "pixel_values": images(1, seed), "attention_mask": mask}


def quantize(model, batches, **options):
    torch.manual_seed(0)
    options = {"bits": 4, "group_size": 16, "progress": False, **options}
    return ptqkit.quantize(model.eval(), "quality", batches, **options)


def test_text_is_shortened_in_all_its_parts():
    ids = tokens(2)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "token_type_ids": ids}
    short = short_batch({**batch, "decoder_input_ids": ids[:, :20]})
    assert {k: tuple(v.shape) for k, v in short.items()} == {
        **dict.fromkeys(batch, (1, 16)),
        "decoder_input_ids": (1, 20),
    }
    assert bool(short["attention_mask"].all())


@pytest.mark.parametrize(
    "other",
    [
        {"pixel_values": images(2)},
        {"pixel_values": torch.zeros(7, 12), "image_grid_thw": torch.ones(3, 3, dtype=torch.long)},
        {"attention_mask": torch.zeros(2, 1, 32, 32)},
        {"position_ids": torch.zeros(3, 2, 32, dtype=torch.long)},
    ],
)
def test_what_cannot_be_shortened_consistently_stays_whole(other):
    batch = {"input_ids": tokens(2), **other}
    short = short_batch(batch)
    assert short.keys() == batch.keys()
    assert all(torch.equal(short[key], value) for key, value in batch.items())


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_images_and_sounds_calibrate(schedule):
    batches = [{"pixel_values": images(2)}, {"pixel_values": images(1, 1)}]
    result = quantize(vit(), batches, schedule=schedule)
    assert len(result.matrices) == 12
    # 16 patches and the class token of 3 images.
    assert {row.tokens for row in result.report.layers if row.status == "quantized"} == {51}
    described = result.report.calibration
    assert (described["tokens"], described["sequence_length"], described["samples"]) == (51, 17, 3)
    sound = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens(2, 10)}
    result = quantize(whisper(), [sound], schedule=schedule)
    seen = {row.tokens for row in result.report.layers if row.status == "quantized"}
    assert len(result.matrices) == 32 and seen == {40, 20}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_come_in_the_dtype_of_the_model(dtype):
    result = quantize(vit().to(dtype), [{"pixel_values": images(2)}])
    assert len(result.matrices) == 12
    sound = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens(2, 10)}
    for schedule in ("one-pass", "replay"):
        result = quantize(whisper().to(dtype), [sound], schedule=schedule)
        assert len(result.matrices) == 32
    assert sound["input_features"].dtype == torch.float32


def test_only_features_change_their_dtype():
    batch = {
        "input_ids": tokens(1, 4),
        "attention_mask": torch.zeros(1, 1, 4, 4),
        "pixel_values": images(1),
    }
    model = vit().bfloat16()
    found = {key: value.dtype for key, value in model_inputs(model, batch).items()}
    assert found == {
        "input_ids": torch.int64,
        "attention_mask": torch.float32,
        "pixel_values": torch.bfloat16,
    }
    model.classifier.float()  # parts of their own dtypes: nobody knows whose the input is
    assert model_inputs(model, batch)["pixel_values"].dtype == torch.float32


def test_lists_of_floats_are_float32():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        data = ptqkit.hf.prepare_calibration([{"pixel_values": images(2).tolist()}])
    finally:
        torch.set_default_dtype(before)
    assert data.batches[0]["pixel_values"].dtype == torch.float32 and data.samples == 2


@pytest.mark.parametrize("at", [0, 10, 20])
def test_an_image_may_stand_anywhere_in_the_prompt(at):
    result = quantize(llava(), [prompt(at), prompt(at, 1)])
    assert len(result.matrices) == 26
    layers = [r for r in result.report.layers if "language_model.layers" in r.name]
    assert len(layers) == 14 and {row.tokens for row in layers} == {80}


def test_estimates_count_the_positions_of_images():
    small, large = (
        quantize(vit(), [{"pixel_values": images(n)}]).report.memory["estimate_one_pass"]
        for n in (1, 101)
    )
    # Per position at least the residual stream twice, in float32.
    assert large - small > 100 * 17 * 2 * 32 * 4


def test_images_beside_padded_text_count_whole():
    batch = prompt(10)
    batch["attention_mask"][0, 30:] = 0
    report = quantize(llava(), [batch, prompt(0, 1)]).report
    counted = {row.name: row.tokens for row in report.layers}
    assert {n for k, n in counted.items() if "language_model.layers" in k} == {30 + 40}
    assert {n for k, n in counted.items() if "vision_tower" in k} == {2 * (_PATCHES + 1)}


def test_padded_pairs_of_text_and_image():
    """CLIP: no row of an image is padding, and what padding holds moves no code."""
    found = []
    for filling in (7, 9):
        ids = tokens(6, 12).clamp(min=3)
        ids[:, 8:] = filling
        mask = (torch.arange(12) < 8).long().expand(6, 12)
        batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(6)}
        found.append(quantize(clip(), [batch]))
    first, other = found
    counted = {r.name: r.tokens for r in first.report.layers if "layers" in r.name}
    assert len(counted) == 24
    for name, rows in counted.items():
        assert rows == 6 * (_PATCHES + 1 if "vision" in name else 8), name
    for name, matrix in first.matrices.items():
        assert (matrix.codes == other.matrices[name].codes).all(), name


def test_padding_that_fits_no_mask_is_found_before_anything_changes():
    """Sound is masked by its samples, while layers read frames."""
    model = sound().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400)}
    assert len(quantize(sound(), [batch]).matrices) == 12
    batch["attention_mask"][0, 300:] = 0
    with pytest.raises(CalibrationError, match=r"encoder.* fits 0 attention masks .* skip"):
        quantize(model, [batch])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_padded_text_is_shortened_as_before():
    short = short_batch(padded_batches()[0])
    assert short["input_ids"].shape == (1, 16) and bool(short["attention_mask"].all())


class Expanding(torch.nn.Module):
    """Puts the places of an image before the tokens itself, where `input_ids` has none."""

    def __init__(self):
        super().__init__()
        self.language_model = T.LlamaForCausalLM(T.LlamaConfig(**_TEXT))
        self.config = self.language_model.config

    def forward(self, input_ids, pixel_values, attention_mask):
        text = self.language_model.get_input_embeddings()(input_ids)
        patches = pixel_values.flatten(1).view(len(text), -1, 32)[:, :_PATCHES]
        mask = torch.cat([attention_mask.new_ones(patches.shape[:2]), attention_mask], 1)
        embeds = torch.cat([patches, text], 1)
        return self.language_model(inputs_embeds=embeds, attention_mask=mask)


def test_padding_is_refused_where_a_model_puts_images_between_the_tokens_itself():
    ids = tokens(2, 12)
    batch = {"input_ids": ids, "pixel_values": images(2), "attention_mask": torch.ones_like(ids)}
    report = quantize(Expanding(), [batch]).report
    counted = {r.tokens for r in report.layers if r.status == "quantized"}
    assert counted == {2 * (_PATCHES + 12)}
    padded = {**batch, "attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][1, 8:] = 0
    with pytest.raises(ptqkit.PreflightError, match="puts the places of images between the tokens"):
        quantize(Expanding(), [batch, padded])
