"""OpenCLIP's losses over gloo, data pipeline and training step, for the other benchmarks."""

import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PORT = "29513"  # port of the process group on this machine


def measure_openclip(
    processes: int, batch: int, dim: int, kind: str, repeats: int, device: str = "cpu"
) -> dict[str, Any]:
    """Times loss and gradients on CPUs or, with `device="cuda"`, on a GPU per process.

    Memory is None: torch's CPU allocator does not report it.
    """
    from torch.multiprocessing import spawn  # re-raises a child process's exception here

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.json"
        spawn(_work, (processes, batch, dim, kind, repeats, device, result), nprocs=processes)
        times = json.loads(result.read_text())
    return {
        "seconds": statistics.median(times),
        "seconds_least": min(times),
        "seconds_most": max(times),
        "temp_bytes": None,
    }


def _work(
    rank: int,
    processes: int,
    batch: int,
    dim: int,
    kind: str,
    repeats: int,
    device: str,
    result: Path,
) -> None:
    import torch
    import torch.distributed as dist
    from open_clip.loss import ClipLoss, SigLipLoss

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=processes)
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    torch.manual_seed(rank)
    options = {"rank": rank, "world_size": processes}
    if kind == "softmax":
        loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, **options)
        values = [14.3]
    else:
        loss = SigLipLoss(**options)
        values = [14.3, -10.0]
    scalars = [torch.tensor(v, device=device, requires_grad=True) for v in values]
    rows = (torch.randn(batch // processes, dim, device=device) for _ in range(2))
    features = [torch.nn.functional.normalize(x).requires_grad_() for x in rows]
    times = []
    for i in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        loss(*features, *scalars).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if i:  # the first iteration is a warm-up
            times.append(time.perf_counter() - start)
    if rank == 0:
        result.write_text(json.dumps(times))
    dist.destroy_process_group()


def openclip_batches(pattern: str, batch: int, workers: int) -> Iterator[Any]:
    """Returns OpenCLIP's webdataset pipeline, with its training transform and tokenizer."""
    import open_clip
    import torch
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    options = SimpleNamespace(
        train_data=pattern,
        train_num_samples=1_000_000,  # per epoch; longer than the measurement
        train_data_upsampling_factors=None,
        dataset_resampled=True,  # as is usual with many shards; the stream never ends
        batch_size=batch,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return iter(get_wds_dataset(options, transform, True, tokenizer=tokenizer).dataloader)


def openclip_step(
    model_name: str, batch: dict[str, np.ndarray], platform: str = "cpu", dtype: str = "float32"
) -> Callable[[], None]:
    """Returns a function that takes one step of OpenCLIP's model with torch's AdamW.

    With `platform="gpu"`, on one GPU; with `dtype="bfloat16"`, under torch's autocast.
    It runs in a process of its own, so that each contender has its own memory allocator.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    device = "cuda" if platform == "gpu" else "cpu"
    arguments = (theirs, model_name, batch, device, dtype)
    context.Process(target=_steps, args=arguments, daemon=True).start()

    def run() -> None:
        ours.send("step")
        ours.recv()  # raises EOFError if the process failed, which has printed why

    theirs.close()
    return run


def _steps(
    pipe: Connection, model_name: str, batch: dict[str, np.ndarray], device: str, dtype: str
) -> None:
    step = _local_step(model_name, batch, device, dtype)
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while pipe.recv():
            step()
            pipe.send("done")


def _local_step(
    model_name: str, batch: dict[str, np.ndarray], device: str, dtype: str
) -> Callable[[], None]:
    import open_clip
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    model = open_clip.create_model(model_name, pretrained=None).to(device).train()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64)).to(device)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device).view(1, 3, 1, 1)

    def run() -> None:
        images = torch.from_numpy(batch["images"]).to(device).permute(0, 3, 1, 2).float() / 255
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            image, text, scale = model((images - mean) / std, tokens)[:3]
            total = loss(image, text, scale)
        total.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
