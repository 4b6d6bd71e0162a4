"""Activation scales of towers: calibrated on images and recordings, they are what transformers computes with."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from intaglio.errors import InputError
from intaglio.packed.checkpoint import checkpoint_spec, load_quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.carried import scales_in_use, tower_kind
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.media import Samples, audio_samples, counted, image_samples, read_wav
from intaglio.train.quantize import quantize
from intaglio.train.towers import Towers
from tests.support.cli import intaglio
from tests.support.tiny import MULTIMODAL, make_checkpoint

RATE = 16_000
SPLIT = "--set=weights.mlp_early.layers=0-1"  # mobile-e2b, for a model of four layers


def write_wav(path: Path, values: np.ndarray, *, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    """values in [-1, 1), [frames x channels]."""
    codes = (values * 2.0 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    data = codes.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint with its processor, `images` and `audio`."""
    folder = tmp_path_factory.mktemp("media")
    checkpoint = make_checkpoint(folder / "checkpoint", MULTIMODAL)
    processor = {
        "image_processor": Gemma4ImageProcessorPil(max_soft_tokens=70).to_dict(),
        "feature_extractor": Gemma4AudioFeatureExtractor().to_dict(),
    }
    (checkpoint / "processor_config.json").write_text(json.dumps(processor, default=lambda array: array.tolist()))
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name, size in (("a.png", (96, 60)), ("b.jpg", (40, 90))):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    (folder / "images/notes.txt").write_text("no image")
    (folder / "audio").mkdir()
    for name, seconds in (("a.wav", 0.5), ("b.wav", 0.9)):
        write_wav(folder / "audio" / name, 0.3 * random.standard_normal(int(seconds * RATE)).clip(-3, 3))
    return folder


@pytest.fixture(scope="module")
def calibrated(media: Path) -> PackedModel:
    made = intaglio(
        "quantize", media / "checkpoint", "--recipe=mobile-e2b", SPLIT, f"--out={media / 'packed'}",
        f"--images={media / 'images'}", f"--audio={media / 'audio'}",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "vision tower: 8-bit activations change its output" in made.out and "are 0, off" not in made.out
    return PackedModel.open(media / "packed")


def samples_of(media: Path) -> list[Samples]:
    model = media / "checkpoint"
    return [image_samples(model, media / "images"), audio_samples(model, media / "audio")]


def test_transformers_computes_the_calibrated_towers_bit_for_bit(
    media: Path, calibrated: PackedModel, tmp_path: Path
) -> None:
    exported = intaglio("export", calibrated.path, "gemma-mobile", f"--out={tmp_path / 'mobile'}")
    assert exported.code == 0 and "exact" in exported.out and "off" not in exported.out
    runtime: Any = load_quantized(tmp_path / "mobile").model
    towers = Towers(calibrated.plan, samples_of(media))
    for tensor in calibrated.plan.carried:
        towers.put(tensor.name, calibrated.read(tensor.name))
    static = {name: value for name, value in calibrated.read_static().items() if tower_kind(name)}
    assert len(static) == sum(total for _, total in scales_in_use(static, static).values()) and all(static.values())
    with torch.no_grad():
        inputs = {given.kind: next(iter(given)) for given in towers.samples}
        floats = {kind: towers.features(kind, given) for kind, given in inputs.items()}
        towers.fix(static)
        image, sound = inputs["vision"], inputs["audio"]
        found = {
            "vision": runtime.get_image_features(image["pixel_values"], image["pixel_position_ids"]).pooler_output[0],
            "audio": runtime.get_audio_features(sound["input_features"], sound["attention_mask"]).pooler_output,
        }
        for kind, given in inputs.items():
            assert torch.equal(found[kind], towers.features(kind, given))
            assert not torch.equal(found[kind], floats[kind])
            error = (found[kind] - floats[kind]).square().mean() / floats[kind].square().mean()
            assert error < 0.05**2, kind


def test_padding_is_left_out(media: Path, calibrated: PackedModel) -> None:
    """More padding of the same picture, which the encoder fills with numbers of its own, changes no scale."""
    images = samples_of(media)[0]

    def padded() -> list[dict[str, torch.Tensor]]:
        short = []
        for inputs in images:
            kept = int(counted(inputs).sum())
            more = -(-kept // 9) * 9
            short.append({name: tensor[:, :more] for name, tensor in inputs.items()})
        return short

    def scales(given: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        read = dict(zip(images.paths, given, strict=True))
        towers = Towers(calibrated.plan, [Samples("vision", images.paths, read.__getitem__)])
        for tensor in calibrated.plan.carried:
            towers.put(tensor.name, calibrated.read(tensor.name))
        return towers.calibrate()

    stored = calibrated.read_static()
    found = scales(padded())
    assert found == pytest.approx({name: stored[name] for name in found}, rel=0.02)


def test_a_tower_without_samples_stays_off_and_says_so(media: Path, tmp_path: Path) -> None:
    made = intaglio(
        "quantize", media / "checkpoint", "--recipe=mobile-e2b", SPLIT, f"--out={tmp_path / 'packed'}",
        f"--images={media / 'images'}",
    )  # fmt: skip
    assert made.code == 0 and "audio tower:" in made.out and "activation scales are 0, off" in made.out
    packed = PackedModel.open(tmp_path / "packed")
    in_use = scales_in_use(packed.plan.carried_scales, packed.read_static())
    assert in_use["vision"][0] == in_use["vision"][1] > 0 and in_use["audio"][0] == 0 < in_use["audio"][1]
    exported = intaglio("export", packed.path, "gemma-mobile", f"--out={tmp_path / 'mobile'}")
    assert exported.code == 0 and "audio tower:" in exported.out and "vision tower:" not in exported.out


@pytest.mark.parametrize("width, channels", [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_wav_of_every_width_is_read(width: int, channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).uniform(-0.9, 0.9, 200 * channels)
    found = read_wav(write_wav(tmp_path / "a.wav", values, width=width, channels=channels), RATE)
    mono = values.reshape(-1, channels).mean(-1)
    assert found.shape == (200,) and np.abs(found - mono).max() < 2.0 ** (2 - 8 * width) + 1e-6


def refusal(media: Path, tmp_path: Path, *options: str, recipe: str = "mobile-e2b") -> str:
    made = intaglio("quantize", media / "checkpoint", f"--recipe={recipe}", f"--out={tmp_path / 'packed'}", *options)
    assert made.code == 2 and not (tmp_path / "packed").exists()
    return made.error


def test_bad_samples_are_refused(media: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(media, tmp_path, SPLIT, f"--images={tmp_path / 'empty'}")
    assert "no such folder" in refusal(media, tmp_path, SPLIT, f"--audio={tmp_path / 'none'}")
    (tmp_path / "empty/a.png").write_bytes(b"\x89PNG\r\n")
    assert "a.png: cannot be read as an image" in refusal(media, tmp_path, SPLIT, f"--images={tmp_path / 'empty'}")
    write_wav(tmp_path / "empty/a.wav", np.zeros(800), rate=8000)
    assert "expects 16000" in refusal(media, tmp_path, SPLIT, f"--audio={tmp_path / 'empty'}")
    write_wav(tmp_path / "empty/a.wav", np.zeros(8))
    assert "shorter than a frame" in refusal(media, tmp_path, SPLIT, f"--audio={tmp_path / 'empty'}")
    (tmp_path / "empty/a.wav").write_bytes(b"RIFF")
    assert "cannot be read as a PCM" in refusal(media, tmp_path, SPLIT, f"--audio={tmp_path / 'empty'}")
    images = f"--images={media / 'images'}"
    assert "quantizes no linear of a vision tower" in refusal(media, tmp_path, images, recipe="mobile")
    assert "quantizes no linear" in refusal(media, tmp_path, SPLIT, images, "--text-only")
    silence = Path(shutil.copytree(media / "audio", tmp_path / "silence"))
    bare = Path(shutil.copytree(media / "checkpoint", tmp_path / "bare"))
    (bare / "processor_config.json").unlink()
    with pytest.raises(InputError, match="processor_config"):
        audio_samples(bare, silence)


def test_towers_join_a_calibrated_text_with_their_own_scales(media: Path, tmp_path: Path) -> None:
    plan = make_plan(checkpoint_spec(media / "checkpoint", text_only=True), Recipe.load("mobile-e2b", [SPLIT[6:]]))
    text = quantize(media / "checkpoint", plan, tmp_path / "text")
    made = intaglio(
        "quantize", media / "checkpoint", f"--trained={text.path}", f"--out={tmp_path / 'whole'}",
        f"--images={media / 'images'}", f"--audio={media / 'audio'}",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert PackedModel.open(tmp_path / "whole").read_static() == PackedModel.open(media / "packed").read_static()
