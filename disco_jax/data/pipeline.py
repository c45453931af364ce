"""From a random-access source to batches, on Grain: decoded, tokenised, in a known order.

Sample k of a run is a function of the seed and of k alone: epoch after epoch, each a permutation of
the source, batches cut from the endless row. So the position in the data is one number, the samples
seen, whatever the number of workers, processes or devices.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from disco_jax.data.transforms import to_pixels
from disco_jax.tokenizer import CLIPTokenizer

Batch = dict[str, np.ndarray]


class Encode:
    """Encoded examples of a batch to arrays: uint8 images, int32 tokens, int32 labels."""

    def __init__(self, image_size: int, context_length: int, image_key: str, caption_key: str):
        self.image_size, self.context_length = image_size, context_length
        self.image_key, self.caption_key = image_key, caption_key

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """`images` `[b, size, size, 3]`, and `tokens` `[b, context_length]` where captions are."""
        batch = {
            "images": np.stack([to_pixels(e[self.image_key], self.image_size) for e in examples])
        }
        if self.caption_key:
            texts = [as_text(example[self.caption_key]) for example in examples]
            batch["tokens"] = CLIPTokenizer(self.context_length)(texts)
        if "label" in examples[0]:
            batch["labels"] = np.array([example["label"] for example in examples], np.int32)
        return batch


def as_text(caption: str | bytes) -> str:
    """A caption as TFDS gives it, decoded."""
    return caption.decode(errors="replace") if isinstance(caption, bytes) else str(caption)


def train_batches(
    source: Sequence[dict[str, Any]],
    encode: Encode,
    *,
    batch_size: int,
    seed: int,
    start: int,
    num_workers: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's share of the batches, from global sample `start` on."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own, also in programs that have none
    samples = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    own = samples.slice(slice(start + process_index, None, process_count))
    batches = own.batch(batch_size // process_count, batch_fn=encode)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = batches.to_iter_dataset(options)
    if num_workers:
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        )
    return iter(stream)


def eval_batches(
    source: Sequence[dict[str, Any]], encode: Encode, *, batch_size: int
) -> Iterator[Batch]:
    """The source in order, once, in batches; the last may be short."""
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        yield encode([source[i] for i in range(start, stop)])
