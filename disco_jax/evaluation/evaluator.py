"""Runs the evaluations in a config's `eval` section for given parameters, on every process."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.data.folder_source import FolderSource
from disco_jax.data.load import Load, Loaded
from disco_jax.data.pipeline import EvalBatch, eval_batches
from disco_jax.data.source import Failure, Joined, Source, describe
from disco_jax.data.sources import class_folders, open_source
from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.data.transforms import Resize
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.evaluation import suite, zeroshot
from disco_jax.evaluation.classes import Classes, load_classes, load_subset, load_templates
from disco_jax.evaluation.encoder import Encoder
from disco_jax.evaluation.retrieval import recall_at
from disco_jax.evaluation.zeroshot import Results, class_embeddings
from disco_jax.mesh import gather_rows
from disco_jax.models import CLIPConfig, Params

RECALL_AT = (1, 5, 10)


class ZeroShotSet(NamedTuple):
    """An opened labeled dataset."""

    source: Joined
    classes: Classes
    templates: tuple[str, ...]
    subset: np.ndarray  # bool [classes]


class Evaluator:
    """Evaluates parameters on datasets that are opened once.

    Raises:
      UserError: if a dataset is missing.
    """

    def __init__(self, config: ConfigDict, model: CLIPConfig, mesh: Mesh):
        self._data, self._eval = config.data, config.eval
        self._size = model.vision.image_size
        self._resize = Resize(model.vision.squash, model.vision.resample)
        self._encoder = Encoder(model, mesh, config.eval.batch_size)
        self._classify = zeroshot.make_classify(self._encoder)
        self._tokenizer = make_tokenizer(model.text)
        self.sets = {name: self._open(name, spec) for name, spec in config.eval.sets.items()}
        self._cached: tuple[Params, dict[tuple[tuple[str, ...], ...], np.ndarray]] = ({}, {})
        self._pairs, self._pairs_data = None, self._data
        if config.eval.retrieval_name or config.eval.retrieval_split:
            data = self._pairs_data = self._data.copy_and_resolve_references()
            if config.eval.retrieval_name:
                data.image_key = config.eval.retrieval_image_key
                data.caption_key = config.eval.retrieval_caption_key
                data.captions_by_line = config.eval.retrieval_captions_by_line
                data.subset = ""
            field = "eval.retrieval_name" if config.eval.retrieval_name else "data.name"
            name = config.eval.retrieval_name or config.data.name
            self._pairs = open_source(data, name, config.eval.retrieval_split, field=field)

    def _open(self, name: str, spec: ConfigDict) -> ZeroShotSet:
        if spec.classes == "tfds":
            from disco_jax.data.tfds_source import class_names  # lazy: TFDS takes seconds to import

            classes = Classes(class_names(spec.source, self._data.dir), [])
        else:
            classes = load_classes(spec.classes)
        field = suite.field_of(name, ".source")
        try:
            root = class_folders(spec.source)
        except UserError as error:
            raise UserError(f"{field}: {error}") from error
        if root is not None:
            source = Joined([FolderSource(root, classes.label_of)])
        else:
            data = self._data.copy_and_resolve_references()
            data.image_key = spec.image_key
            source = open_source(
                data,
                spec.source,
                spec.split,
                field=field,
                captions=False,
                label_of=classes.label_of,
            )
        if spec.classes in suite.NAMES:
            for part in source.sources:
                _check_labels(part, classes.ids, f"{field}: {part.fingerprint}")
        templates = tuple(load_templates(spec.templates))
        return ZeroShotSet(source, classes, templates, load_subset(spec.subset, classes))

    def run(self, params: Params) -> dict[str, float]:
        """Returns every set's metrics, e.g. `NAME/top1`, and recall in both directions.

        With sets of the suite, also returns the mean of their scores, `clip/mean`.
        """
        metrics: dict[str, float] = {}
        for name in self.sets:
            metrics |= self.metrics(name, self.classify(params, name))
        return metrics | suite.mean(metrics) | self.retrieval(params)

    def metrics(self, name: str, results: Sequence[Results]) -> dict[str, float]:
        """Returns metrics of `classify`'s results: within the set's subset and over all classes."""
        metrics = {f"{name}/{metric}": value for metric, value in results[0].metrics().items()}
        for over_all in results[1:]:
            count = len(self.sets[name].classes.names)
            for metric, value in over_all.metrics().items():
                metrics[f"{name}/{metric}_of_all_{count}"] = value
        return metrics

    def classify(self, params: Params, name: str) -> list[Results]:
        """Returns the nearest classes of every image of a set.

        The first result is within the set's subset. Unless the subset covers all classes, a second
        result over all of them follows.

        Raises:
          UserError: if no image is usable, or a label is out of range.
        """
        opened = self.sets[name]
        subsets = opened.subset[None]
        if not opened.subset.all():
            subsets = np.stack([opened.subset, np.ones_like(opened.subset)])
        embeddings = self.embeddings(params, name)
        labels, nearest = [], []
        bad: list[Failure] = []
        for batch in self._batches(opened.source, name, self._data, bad):
            labels_of_batch, found = self._classify(
                params,
                self._encoder.place(batch.images(self._size)),
                self._encoder.place(batch.labels()),
                embeddings,
                subsets,
            )
            labels.append(np.asarray(labels_of_batch))
            nearest.append(np.asarray(found))
        label, index = np.concatenate(labels), np.flatnonzero(np.concatenate(labels) >= 0)
        if not len(index):
            source = opened.source.fingerprint
            raise UserError(f"{suite.field_of(name)}: no usable image in {source}{_told(bad)}")
        if label.max() >= len(opened.classes.names):
            raise UserError(
                f"{suite.field_of(name)}: label {label.max()} is out of range for the "
                f"{len(opened.classes.names)} classes of {self._eval.sets[name].classes}"
            )
        by_subset = np.concatenate(nearest, axis=1)
        return [Results(index, label[index], rows[index]) for rows in by_subset]

    def embeddings(self, params: Params, name: str) -> np.ndarray:
        """Returns fp32 `[classes, embed_dim]`, a set's class embeddings from its prompts."""
        opened = self.sets[name]
        key = (tuple(opened.classes.names), opened.templates)
        # Sets with the same classes and prompts, like the paper's four, share embeddings. New
        # parameters mean a new evaluation, which clears the cache.
        if self._cached[0] is not params:
            self._cached = (params, {})
        known = self._cached[1]
        if key not in known:
            known[key] = class_embeddings(
                self._encoder, params, self._tokenizer, opened.classes.names, opened.templates
            )
        return known[key]

    def retrieval(self, params: Params) -> dict[str, float]:
        """Returns recall at 1, 5 and 10 in both directions; empty without a retrieval set.

        Rows of a table that name the same image count as one image with several captions.

        Raises:
          UserError: if no sample is usable.
        """
        if self._pairs is None:
            return {}
        features, names, tokens, owners = [], [], [], []
        rows = 0
        bad: list[Failure] = []
        for batch in self._batches(self._pairs, "retrieval", self._pairs_data, bad):
            images = self._encoder.place(batch.images(self._size))
            features.append(np.asarray(self._encoder.image(params, images)))
            names.append(self._gather([_digest(sample) for sample in batch.samples], np.uint8))
            ids, counts = self._caption_tokens(batch)
            owners.append(rows + np.repeat(np.arange(len(counts)), counts))
            tokens.append(ids)
            rows += len(counts)
        if not len(np.concatenate(tokens)):
            raise UserError(f"retrieval: no usable sample in {self._pairs.fingerprint}{_told(bad)}")
        # The first row that names an image stands for it. Bad samples, without captions, drop out.
        name = np.concatenate(names)
        _, first, same = np.unique(name, axis=0, return_index=True, return_inverse=True)
        shared = name.any(axis=1)
        image = np.where(shared, first[same.ravel()], np.arange(rows))
        owner = image[np.concatenate(owners)]
        own, owner = np.unique(owner, return_inverse=True)
        texts = self._encoder.encode_texts(params, np.concatenate(tokens))
        recalls = recall_at(
            np.concatenate(features)[own], texts, owner, RECALL_AT, self._encoder.mesh
        )
        return {f"retrieval/{name}": value for name, value in recalls.items()}

    def _caption_tokens(self, batch: EvalBatch) -> tuple[np.ndarray, np.ndarray]:
        """Returns a batch's captions on all processes and the number of captions per sample.

        The captions are tokens, `[captions, context_length]`.
        """
        captions = [sample.captions if sample else () for sample in batch.samples]
        counts = self._gather([len(texts) for texts in captions], np.int32)
        most = int(counts.max())
        padded = np.zeros((len(captions), most, self._tokenizer.context_length), np.int32)
        for row, texts in zip(padded, captions, strict=True):
            if texts:
                row[: len(texts)] = self._tokenizer(texts)
        real = np.arange(most) < counts[:, None]
        return self._gather(padded, np.int32)[real], counts

    def _gather(self, rows: Any, dtype: type) -> np.ndarray:
        """Gathers the whole batch, in order, on every process from each process's rows."""
        return gather_rows(np.asarray(rows, dtype), self._encoder.mesh)

    def _batches(
        self, source: Joined, name: str, data: ConfigDict, bad: list[Failure]
    ) -> Iterator[EvalBatch]:
        """Yields the source's batches, adds bad samples to `bad` and reports them at the end."""
        load = Load(source, data, self._size, resize=self._resize)
        for batch in eval_batches(
            len(source),
            load,
            batch_size=self._encoder.batch_size,
            rows=self._encoder.rows,
        ):
            bad.extend(batch.failures)
            yield batch
        if bad:
            say(f"left out of {name}{_told(bad)}", sys.stderr)

    def pictures(self, name: str, chosen: np.ndarray) -> list[np.ndarray]:
        """Returns the set's images at the given indices, each uint8 `[size, size, 3]`."""
        load = Load(self.sets[name].source, self._data, self._size, resize=self._resize)
        return [load.evaluate(int(index)).pixels for index in chosen]


def _check_labels(source: Source, expected: list[str], told: str) -> None:
    """Checks that a TFDS dataset's labels have the expected names, in the expected order.

    Raises:
      UserError: if they don't. Sources of other kinds are labeled by name or index.
    """
    if not (names := getattr(source, "label_names", None)):
        return
    if len(names) != len(expected):
        raise UserError(f"{told} has {len(names)} labels; it must have {len(expected)}")
    for i, (name, wanted) in enumerate(zip(names, expected, strict=True)):
        if name != wanted:
            raise UserError(f"{told}: label {i} is {name!r}; it must be {wanted!r}")


def _told(bad: list[Failure]) -> str:
    """Returns this process's bad samples by kind, and the first of them."""
    if not bad:
        return ""
    kind, key, detail = bad[0]
    counts = describe(Counter(kind for kind, _, _ in bad))
    return f": {counts}; the first is {key}: {kind} {detail}".rstrip()


def _digest(sample: Loaded | None) -> list[int]:
    """Hashes a sample's image name to numbers that processes can exchange; zeros without a name."""
    if sample is None or sample.image_name is None:
        return [0] * 16
    name = sample.image_name.encode(errors="surrogateescape")
    return list(hashlib.blake2b(name, digest_size=16).digest())
