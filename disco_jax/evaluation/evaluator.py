"""All that a config's `eval` section asks for, of given parameters."""

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import resources

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.data.load import Load
from disco_jax.data.pipeline import Batch, Collate, eval_batches
from disco_jax.data.shapes import vocabulary
from disco_jax.data.source import Joined
from disco_jax.data.sources import open_source
from disco_jax.data.tfds_source import class_names
from disco_jax.evaluation import baseline, zeroshot
from disco_jax.evaluation.encoder import Encoder
from disco_jax.evaluation.retrieval import recall_at
from disco_jax.models import CLIPConfig
from disco_jax.tokenizer import CLIPTokenizer
from disco_jax.training.state import Params

BASELINE_IMAGES = 10_000  # training images that the bag-of-colours baseline is fitted to


class Evaluator:
    """Opens the data sets once; raises UserError where one is not there."""

    def __init__(self, config: ConfigDict, model: CLIPConfig, mesh: Mesh):
        self._data, self._eval = config.data, config.eval
        self._encoder = Encoder(model, mesh, config.eval.batch_size)
        self._tokenizer = CLIPTokenizer(model.text.context_length)
        self._image_size = model.vision.image_size
        self.names: list[str] = []
        self._splits: dict[str, Joined] = {}
        if config.eval.name:
            self.names = class_names(config.eval.name, config.data.dir)
            for metric, split in config.eval.splits.items():
                self._splits[metric] = open_source(
                    config.data, config.eval.name, split, captions=False
                )
        self.templates = load_templates(config.eval.templates)
        self._pairs = None
        if config.eval.retrieval_split:
            self._pairs = open_source(
                config.data,
                config.eval.retrieval_name or config.data.name,
                config.eval.retrieval_split,
            )

    @property
    def split_names(self) -> list[str]:
        """Names of the zero-shot splits, as in their metrics."""
        return list(self._splits)

    def run(self, params: Params) -> dict[str, float]:
        """`zeroshot/top1` and the like of every split, and recall@1 and @5 both ways."""
        metrics = {}
        if self._splits:
            classes = self.class_embeddings(params)
            for name in self._splits:
                _, labels, predicted = self.predictions(params, classes, name)
                metrics[f"{name}/top1"] = zeroshot.top1(predicted, labels)
        return metrics | self.retrieval(params)

    def class_embeddings(self, params: Params) -> np.ndarray:
        """fp32 `[classes, embed_dim]` from the config's prompts."""
        return zeroshot.class_embeddings(
            self._encoder, params, self._tokenizer, self.names, self.templates
        )

    def predictions(
        self, params: Params, classes: np.ndarray, name: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, true and predicted classes of one of the zero-shot splits."""
        images, labels, predicted = [], [], []
        for batch in self._batches(self._splits[name]):
            features = self._encoder.image(params, batch.arrays["images"])
            images.append(batch.arrays["images"])
            labels.append(batch.labels)
            predicted.append(zeroshot.predict(features, classes))
        return np.concatenate(images), np.concatenate(labels), np.concatenate(predicted)

    def retrieval(self, params: Params) -> dict[str, float]:
        """Recall at 1 and 5, captions by image and images by caption; empty without a split."""
        if self._pairs is None:
            return {}
        batches = [batch.arrays for batch in self._batches(self._pairs)]
        image = np.concatenate([self._encoder.image(params, b["images"]) for b in batches])
        text = np.concatenate([self._encoder.text(params, b["tokens"]) for b in batches])
        ways = {"image_to_text": (image, text), "text_to_image": (text, image)}
        return {
            f"retrieval/{way}_recall@{k}": value
            for way, (queries, candidates) in ways.items()
            for k, value in recall_at(queries, candidates, (1, 5)).items()
        }

    def baselines(self) -> dict[str, float]:
        """Chance, and what colours alone give, on every zero-shot split; empty without one."""
        if not self._splits:
            return {}
        source = open_source(self._data, self._eval.name, self._eval.train_split, captions=False)
        chosen = np.random.default_rng(0).permutation(len(source))[:BASELINE_IMAGES]
        load = Load(source, self._data, self._image_size)
        train = Collate(0)([load.evaluate(int(i)) for i in chosen])
        names = [self.names[label] for label in train.labels]
        metrics = {"chance/top1": 1 / len(self.names)}
        for split, examples in self._splits.items():
            batches = list(self._batches(examples))
            images = np.concatenate([batch.arrays["images"] for batch in batches])
            labels = np.concatenate([batch.labels for batch in batches])
            predicted = baseline.fit_predict(train.arrays["images"], names, images, self.names)
            metrics[f"bag_of_colours/{split}_top1"] = zeroshot.top1(predicted, labels)
        return metrics

    def _batches(self, source: Joined) -> Iterator[Batch]:
        load = Load(source, self._data, self._image_size)
        collate = Collate(self._tokenizer.context_length)
        for batch in eval_batches(source, load, collate, batch_size=self._eval.batch_size):
            for kind, key, detail in batch.failures:
                print(f"left out of the evaluation: {key}: {kind} {detail}", file=sys.stderr)
            yield batch


def load_templates(name: str) -> Sequence[str]:
    """Prompts by name: those of `shapes`, or CLIP's 80 for ImageNet."""
    if name == "shapes":
        return vocabulary.TEMPLATES
    path = resources.files("disco_jax").joinpath("assets", f"{name}_templates.json")
    return json.loads(path.read_text())
