"""Inference with a trained model: image and text features, and zero-shot classification."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from disco_jax.data.source import BadSample
from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.data.transforms import ImageLimits, open_image, to_pixels
from disco_jax.errors import UserError
from disco_jax.evaluation.encoder import Encoder
from disco_jax.evaluation.zeroshot import class_embeddings
from disco_jax.interop.transfer import read_model
from disco_jax.mesh import make_mesh, replicated
from disco_jax.models import CLIPConfig, Params

Picture = Image.Image | str | Path
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
        self._tokenizer = make_tokenizer(config.text)

    @property
    def batch_size(self) -> int:
        """Images or texts per batch, a multiple of the number of devices."""
        return self._encoder.batch_size

    @property
    def logit_scale(self) -> float:
        """The learned factor that cosine similarities are multiplied by."""
        return float(np.exp(self._params["logit_scale"]))

    def encode_image(self, images: Sequence[Picture]) -> np.ndarray:
        """Encodes Pillow images or image files, resized and cropped as in evaluation.

        Returns:
          fp32 `[n, embed_dim]`.

        Raises:
          UserError: if an image can't be read; the message names it.
        """
        return self.encode_pixels(np.stack([self.read(image) for image in images]))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes uint8 `[n, size, size, 3]`, as returned by `read`, to fp32 `[n, embed_dim]`."""
        return self._encoder.encode_all(self._encoder.image, self._params, pixels)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes texts to fp32 `[n, embed_dim]`."""
        tokens = self._tokenizer(texts)
        return self._encoder.encode_texts(self._params, tokens)

    def classify(
        self, images: Sequence[Picture], names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> np.ndarray:
        """Returns class probabilities, fp32 `[n, names]`: the softmax of the scaled cosines."""
        classes = class_embeddings(self._encoder, self._params, self._tokenizer, names, templates)
        logits = self.logit_scale * self.encode_image(images) @ classes.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def read(self, image: Picture) -> np.ndarray:
        """Reads a Pillow image or an image file as uint8 `[size, size, 3]`.

        Raises:
          UserError: if it can't be read.
        """
        size, squash = self.config.vision.image_size, self.config.vision.squash
        try:
            if isinstance(image, Image.Image):
                return to_pixels(image, size, "", squash)
            opened = open_image(Path(image).read_bytes(), LIMITS, str(image))
            return to_pixels(opened, size, "", squash)
        except BadSample as bad:
            raise UserError(f"{image}: {bad.kind} {bad.detail}".rstrip()) from bad
        except OSError as error:
            raise UserError(f"{image} can't be read: {error.strerror}") from error


def load(path: str | Path, batch_size: int = 64) -> Model:
    """Loads the model in a folder written by `interop import`, or a run's newest checkpoint.

    Raises:
      UserError: if `path` is neither, or is damaged.
    """
    return Model(*read_model(Path(path).expanduser()), batch_size)
