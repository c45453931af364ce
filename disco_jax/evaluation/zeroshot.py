"""Zero-shot classification, as CLIP does it (Radford et al., 2021, section 3.1)."""

from collections.abc import Sequence

import numpy as np

from disco_jax.evaluation.encoder import Encoder
from disco_jax.tokenizer import CLIPTokenizer
from disco_jax.training.state import Params


def class_embeddings(
    encoder: Encoder,
    params: Params,
    tokenizer: CLIPTokenizer,
    names: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:
    """fp32 `[classes, embed_dim]`: a class's mean over prompts of unit embeddings, unit again."""
    prompts = [template.format(name) for name in names for template in templates]
    features = encoder.text(params, tokenizer(prompts))
    mean = features.reshape(len(names), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def predict(image_features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class `[n]` whose embedding is nearest to each image's; the first of equals."""
    return np.argmax(image_features @ classes.T, axis=1)


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of right predictions."""
    return float(np.mean(predicted == labels))
