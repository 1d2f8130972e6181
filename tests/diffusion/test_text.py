"""Text-to-image pipelines of diffusers through the library and through ``ptqkit softmax``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from helpers.diffusion_models import tiny_model, tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ptqkit import diffusion
from ptqkit.cli import main
from ptqkit.diffusion.table import decibel_with_error
from ptqkit.errors import UnsupportedModuleError
from ptqkit.nn.softmax.variants import UNET_VARIANTS

PROMPTS = ["a cat", "two dogs", "a tree"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Stable Diffusion's classes with random weights; the tokenizer knows letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=12,
                bos_token_id=len(words) - 2,
                eos_token_id=len(words) - 1,
            )
        )
        decoder = AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=32
        )
    return StableDiffusionPipeline(
        vae=decoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=tiny_unet(in_channels=4, out_channels=4),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path / "model")
    (path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    return path


def test_prompts_take_the_place_of_classes(pipeline, folder):
    model = diffusion.with_prompts(pipeline, PROMPTS)
    assert model.labels.shape == (4, 12, 8)
    with torch.no_grad():
        ids = pipeline.tokenizer("two dogs", padding="max_length", return_tensors="pt").input_ids
        expected = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(model.context(5)[1:2], expected)
    torch.testing.assert_close(model.context(5)[4:5], expected)
    loaded = diffusion.load_text_to_image(folder / "model", PROMPTS)
    torch.testing.assert_close(loaded.labels, model.labels)
    noise = model.noise(2)
    assert noise.shape == (2, 4, 16, 16)
    found = diffusion.sample(
        model.unet, model.scheduler, noise, model.context(2), steps=2, guidance=3.0,
        no_class=model.labels[-1],
    )  # fmt: skip
    assert torch.isfinite(found).all()


def test_what_is_no_text_to_image_pipeline_is_refused(pipeline, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        diffusion.load_text_to_image(tmp_path, PROMPTS)
    with pytest.raises(UnsupportedModuleError, match="not a text-to-image pipeline"):
        diffusion.with_prompts(tiny_model(), PROMPTS)
    with pytest.raises(ValueError, match="prompts is empty"):
        diffusion.with_prompts(pipeline, [])
    other = tiny_unet(in_channels=4, out_channels=4)
    other.register_to_config(addition_embed_type="text_time")
    monkeypatch.setattr(pipeline, "unet", other)
    with pytest.raises(UnsupportedModuleError, match="Stable Diffusion XL"):
        diffusion.with_prompts(pipeline, PROMPTS)


def run(folder, *options):
    small = ["--images", 3, "--steps", 2, "--latents", 4, "--bits", 4]
    model = folder / "model"
    return main(["softmax", str(model), *(str(o) for o in [*small, *options])])


def test_command(folder, capsys):
    options = ["--text", folder / "prompts.txt", "--guidance", 2, "--weights", 4, "--json", "-"]
    chosen = ["bias/step_head", "before/row_sum", "log2"]
    assert run(folder, *options, "--correction", *chosen) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    plain = ["SM4", *(f"SM4 + {name}" for name in chosen)]
    assert [*rows] == ["FP32", *plain, "W4A16", *(f"W4A16-{name}" for name in plain)]
    assert rows["SM4 + before/row_sum"]["sqnr_db"] > rows["SM4"]["sqnr_db"] + 3
    assert rows["W4A16-SM4 + before/row_sum"]["sqnr_db"] < rows["SM4 + before/row_sum"]["sqnr_db"]
    assert all(row["sqnr_error"] > 0 for row in list(rows.values())[1:])
    assert found["settings"] == {
        "images": 3, "steps": 2, "latents": 4, "guidance": 2.0, "seed": 0
    }  # fmt: skip


def test_command_saves_next_to_the_unet(folder, capsys):
    unet_folder = folder / "model" / "unet"
    options = ["--text", folder / "prompts.txt", "--out", unet_folder, "--quiet"]
    assert run(folder, *options, "--correction", "before/row_sum") == 0
    assert np.isfinite(float(capsys.readouterr().out))
    model = diffusion.load_text_to_image(folder / "model", PROMPTS)
    loaded = diffusion.load_softmax(model.unet, unet_folder)
    assert {q.grid.of for q in loaded.quantizers.values()} == {"exponentials"}
    assert {q.correction for q in loaded.quantizers.values()} == {"row_sum"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the prompts of the pipeline"),
        (["--text", "TEXT", "--correction", "row_length"], "row_length is for language models"),
        (["--text", "TEXT", "--window", "8"], "--window is for language models"),
        (["--text", "TEXT", "--images", "0"], "--images must be at least 1"),
        (
            ["--text", "TEXT", "--out", "nowhere", "--correction", "row_sum"],
            "give the folder that holds its weights",
        ),
    ],
)
def test_mistakes(folder, capsys, options, message):
    options = [folder / "prompts.txt" if o == "TEXT" else o for o in options]
    assert run(folder, *options) == 2
    assert message in capsys.readouterr().err


def test_table_of_a_model_with_labels():
    seen = []
    table = diffusion.softmax_table(
        tiny_model(), bits=(4,), corrections=("log2",), images=2, steps=2, latents=4,
        progress=seen.append,
    )  # fmt: skip
    assert [row.name for row in table.rows] == ["FP32", "SM4", "SM4 + log2"]
    assert "SM4 + log2" in table.table() and len(seen) == 5
    assert set(table.to_dict()) == {"rows", "settings"}
    with pytest.raises(ValueError, match="each of corrections must be one of"):
        diffusion.softmax_table(tiny_model(), corrections=("row_length",))
    assert all(len(v) == 3 for v in UNET_VARIANTS.values())


def test_errors_of_decibels_are_those_of_a_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 30))
    y = x + rng.normal(size=x.shape) * rng.uniform(0.1, 0.3, (400, 1))
    value, error = decibel_with_error(x, y)
    parts = [decibel_with_error(x[i::8], y[i::8])[0] for i in range(8)]
    spread = np.std(parts, ddof=1) / np.sqrt(8)
    assert spread / 2 < error < 2 * spread and abs(np.mean(parts) - value) < 0.2
    assert np.isnan(decibel_with_error(x[:1], y[:1])[1])
