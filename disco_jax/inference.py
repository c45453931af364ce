"""Inference with a trained model: image and text features, and zero-shot classification."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from disco_jax.data.source import BadSample
from disco_jax.data.tokenizer import TextTokenizer, make_tokenizer
from disco_jax.data.transforms import ImageLimits, Resize, open_image, to_pixels
from disco_jax.errors import UserError
from disco_jax.evaluation.encoder import Encoder
from disco_jax.evaluation.zeroshot import class_embeddings
from disco_jax.interop.transfer import read_model
from disco_jax.mesh import make_mesh, replicated
from disco_jax.models import CLIPConfig, Params
from disco_jax.processes.plugins import ignore_absent_accelerators
from disco_jax.runs.places import run_place
from disco_jax.storage.files import read_whole
from disco_jax.storage.urls import place

Picture = Image.Image | np.ndarray | str | Path
TEMPLATES = ("a photo of a {}.",)  # from CLIP, section 3.1.4
LIMITS = ImageLimits(max_image_pixels=100_000_000, min_image_side=1, max_aspect_ratio=100.0)


class Model:
    """Computes unit-length features on all devices of the machine.

    The image tower is compiled once, the text tower once for each of a few lengths of texts.

    Args:
      config: the towers.
      params: their parameters, by name.
      batch_size: images or texts per batch, rounded up to a multiple of the number of devices.
    """

    def __init__(self, config: CLIPConfig, params: Params, batch_size: int):
        mesh = make_mesh()
        self.config = config
        self._params = jax.device_put(params, replicated(mesh))
        self._encoder = Encoder(config, mesh, batch_size)

    @cached_property
    def _tokenizer(self) -> TextTokenizer:  # a model whose tokenizer is missing still has images
        return make_tokenizer(self.config.text)

    @property
    def batch_size(self) -> int:
        """Images or texts per batch, a multiple of the number of devices."""
        return self._encoder.batch_size

    @property
    def logit_scale(self) -> float:
        """The learned factor that cosine similarities are multiplied by."""
        return float(np.exp(self._params["logit_scale"]))

    def encode_image(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """Encodes images, resized and cropped as in evaluation.

        Args:
          images: Pillow images, files, or uint8 arrays `[h, w, 3]`; or only one of them. An array
            `[n, h, w, 3]` is n images.

        Returns:
          fp32 `[n, embed_dim]`, with n = 1 for a single image and 0 for an empty list.

        Raises:
          UserError: if an image can't be read; the message names it.
        """
        pixels = [self.read(image) for image in _listed(images)]
        return self.encode_pixels(np.stack(pixels)) if pixels else self._nothing()

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes uint8 `[n, size, size, 3]`, as returned by `read`, to fp32 `[n, embed_dim]`."""
        return self._encoder.encode_all(self._encoder.image, self._params, pixels)

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Encodes texts, or only one, to fp32 `[n, embed_dim]`; n is 0 for an empty list.

        Raises:
          UserError: if one is not a string, or the model's tokenizer is missing or does not fit.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}; it must be a string")
        if not texts:
            return self._nothing()
        tokens = self._tokenizer(texts)
        return self._encoder.encode_texts(self._params, tokens)

    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self.config.embed_dim), np.float32)

    def classify(
        self,
        images: Picture | Sequence[Picture],
        names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> np.ndarray:
        """Returns class probabilities, fp32 `[n, names]`: the softmax of the scaled cosines.

        Args:
          images: as in `encode_image`.
          names: the classes.
          templates: prompts, in which `{}` stands for a class.

        Raises:
          UserError: if an image can't be read, or there are no names or no templates.
        """
        for field, given in (("names", names), ("templates", templates)):
            if isinstance(given, str) or not len(given):
                raise UserError(f"{field} is {given!r}; it must be a list of strings, not empty")
        classes = class_embeddings(self._encoder, self._params, self._tokenizer, names, templates)
        logits = self.logit_scale * self.encode_image(images) @ classes.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def read(self, image: Picture) -> np.ndarray:
        """Reads an image, as in `encode_image`, as uint8 `[size, size, 3]`.

        Raises:
          UserError: if it can't be read.
        """
        vision = self.config.vision
        size, resize = vision.image_size, Resize(vision.squash, vision.resample)
        try:
            if isinstance(image, np.ndarray):
                image = _from_array(image)
            if isinstance(image, Image.Image):
                return to_pixels(image, size, "", resize)
            if not isinstance(image, str | Path):
                raise UserError(
                    f"an image is a {type(image).__name__}; it must be a path, a Pillow image or "
                    "a uint8 array [h, w, 3]"
                )
            opened = open_image(read_whole(place(str(image))), LIMITS, str(image))
            return to_pixels(opened, size, "", resize)
        except BadSample as bad:
            raise UserError(f"{image}: {bad.kind} {bad.detail}".rstrip()) from bad
        except OSError as error:
            raise UserError(f"{image} can't be read: {error.strerror}") from error


def _listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if isinstance(images, np.ndarray):
        return [images] if images.ndim == 3 else list(images)
    return images


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"an image is an array of {pixels.dtype} {pixels.shape}; it must be uint8 [h, w, 3]"
        )
    return Image.fromarray(pixels)


def load(path: str | Path, batch_size: int = 64) -> Model:
    """Loads the model in a folder written by `interop import`, or a run's newest checkpoint.

    Args:
      path: the folder, or the URL of one in a bucket.
      batch_size: as in `Model`.

    Raises:
      UserError: if `path` is neither, or is damaged.
      DataLost: if it is in a bucket whose store does not answer.
    """
    ignore_absent_accelerators()
    return Model(*read_model(run_place(str(path), "path")), batch_size)
