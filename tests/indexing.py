"""Shards with an index each, for tests."""

import argparse
import re
import tarfile

from disco_jax.config import default
from disco_jax.data.index import index
from disco_jax.data.sources import open_source
from disco_jax.data.tar_source import TarSource
from tests.tars import shard


def run_index(pattern, out="", part="1/1", jobs=1) -> None:
    index(argparse.Namespace(pattern=str(pattern), out=str(out), part=part, jobs=jobs))


def opened(name, index="") -> TarSource:
    data = default().data
    data.caption_key, data.index = "txt", str(index)
    source = open_source(data, str(name), "").sources[0]
    assert isinstance(source, TarSource)
    return source


def shards(folder, count: int = 4) -> list:
    """Writes shards of five samples, the second with problems and ignored members."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [shard(folder / f"{i:05}.tar", range(5 * i, 5 * i + 5)) for i in range(count)]
    with tarfile.open(paths[1], "a") as tar:
        for name in ("alone.txt", "odd.npy", "also.npy"):
            tar.addfile(tarfile.TarInfo(name))
    return paths


def upload(bucket, folder, prefix: str = "d") -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def everything(source) -> tuple:
    """Returns all that a source tells, with the keys of samples from their shard's name on."""
    samples = [source[i] for i in range(len(source))]
    rows = [(re.sub(r".*/(\d+\.tar)", r"\1", s.key), s.image, s.captions, s.label) for s in samples]
    return rows, source.fingerprint, source.problems, source.ignored
