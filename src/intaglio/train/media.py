"""Images and recordings of a folder, as a model's own processor turns them into inputs of its towers.

The towers' arguments are those of transformers' Gemma 4: patches [1, P, 3 x patch^2] with their places
[1, P, 2], -1 where it is padding; log-mel frames [1, T, bins] with a mask [1, T].
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from intaglio.errors import ConfigError, InputError
from intaglio.plan.files import one_line

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RECORDINGS = (".wav",)
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Files of one kind, "vision" or "audio"; read when they are iterated over, one at a time."""

    kind: str
    paths: tuple[Path, ...]
    read: Callable[[Path], Inputs]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Inputs]:
        return (self.read(path) for path in self.paths)

    @property
    def what(self) -> str:
        """A count with its noun, such as '3 images'."""
        noun = "image" if self.kind == "vision" else "recording"
        return f"{len(self)} {noun}" + ("s" if len(self) > 1 else "")


def image_samples(model_dir: str | Path, folder: str | Path) -> Samples:
    """The images of a folder. InputError for a folder without any, ConfigError for a model without a processor."""
    paths = _files(Path(folder), IMAGES, "images")
    try:
        from PIL import Image
    except ImportError:
        raise InputError("images are read by pillow, which is not installed: pip install 'intaglio[vision]'") from None
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor: Any = _processor(Gemma4ImageProcessorPil, Path(model_dir))

    def read(path: Path) -> Inputs:
        try:
            with Image.open(path) as image:
                made = processor(image.convert("RGB"), return_tensors="pt")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: cannot be read as an image: {one_line(error)}") from None
        return {"pixel_values": made["pixel_values"].float(), "pixel_position_ids": made["image_position_ids"]}

    return Samples("vision", paths, read)


def audio_samples(model_dir: str | Path, folder: str | Path) -> Samples:
    """The .wav files of a folder, mono or mixed down to it. Errors as `image_samples`."""
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

    paths = _files(Path(folder), RECORDINGS, "recordings")
    extractor: Any = _processor(Gemma4AudioFeatureExtractor, Path(model_dir))

    def read(path: Path) -> Inputs:
        made = extractor([read_wav(path, extractor.sampling_rate)], return_tensors="pt")
        mask = made["input_features_mask"].bool()
        if not bool(mask.any()):
            raise InputError(f"{path}: is shorter than a frame of {extractor.frame_length} samples: leave it out")
        return {"input_features": made["input_features"].float(), "attention_mask": mask}

    return Samples("audio", paths, read)


def read_wav(path: Path, rate: int) -> NDArray[np.float32]:
    """Samples in [-1, 1) of a PCM file of 8, 16, 24 or 32 bits. InputError for any other, and for another rate."""
    try:
        with wave.open(str(path), "rb") as file:
            found, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path}: cannot be read as a PCM .wav file: {one_line(error)}") from None
    if found != rate:
        raise InputError(f"{path}: {found} samples a second, the model's processor expects {rate}: resample it")
    raw = np.frombuffer(data[: len(data) - len(data) % (width * channels)], np.uint8).reshape(-1, width)
    if width == 1:  # the one width that has no sign
        values = raw[:, 0].astype(np.float64) - 128
    else:  # the highest bytes of 32 bits, low bytes first
        padded = np.zeros((len(raw), 4), np.uint8)
        padded[:, 4 - width :] = raw
        values = padded.view("<i4")[:, 0].astype(np.float64) / 2.0 ** (8 * (4 - width))
    mono: NDArray[np.float64] = values.reshape(-1, channels).mean(-1) / 2.0 ** (8 * width - 1)
    return mono.astype(np.float32)


def _files(folder: Path, suffixes: tuple[str, ...], what: str) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: expected one with {what} ({', '.join(suffixes)})")
    paths = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes))
    if not paths:
        raise InputError(f"{folder}: holds no {what}: expected files that end in {', '.join(suffixes)}")
    return paths


def _processor(kind: Any, model_dir: Path) -> Any:
    """The model's own settings of a transformers processor, not the class's."""
    try:
        return kind.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError for no file, and anything for what it may hold
        raise ConfigError(
            f"{model_dir}: no usable processor for images or recordings ({one_line(error)}): expected "
            "processor_config.json or preprocessor_config.json, as the original checkpoint has it"
        ) from None


def counted(inputs: Inputs) -> Tensor:
    """True for positions [1, P] in a tower's layers that are no padding; scales are calibrated on these."""
    if "pixel_position_ids" in inputs:
        return (inputs["pixel_position_ids"] != -1).all(-1)
    return inputs["attention_mask"][:, ::2][:, ::2]  # two convolutions of stride two come first
