"""The configuration: every field with its default and meaning, read, checked and written.

A config file is Python with a `get_config()` that takes `default()` and changes what differs.
"""

from typing import Any

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """All fields. Sizes are global, over all devices and processes."""
    c = ConfigDict()
    c.seed = 0  # of parameters and of the order of samples
    c.batch_size = 1024  # samples a step
    # Exact large batches: towers run on so many samples a device at a time, the loss on all of them
    # at once (disco_jax/step/gradients.py). 0: everything at once.
    c.microbatch = 0
    # Where a batch's images wait: `scan`, on the devices, in one program; `host`, in the host's
    # memory, which then bounds the batch.
    c.microbatch_mode = "scan"
    # Dtype in which the devices' gradients are summed, once a step: float32; or bfloat16, for half
    # the traffic.
    c.reduce_dtype = "float32"
    c.init_from = ""  # a model folder (python -m disco_jax.interop) or a run, to begin from
    c.num_steps = 10_000  # optimiser updates in all
    # Passes over data.num_samples, to be checked against num_steps and batch_size; 0: not checked.
    c.num_epochs = 0.0
    c.fsdp = 1  # devices over which one copy of parameters and optimiser state is split
    c.fake_devices = 0  # run on so many CPU devices; 0: on what the machine has

    c.model = ConfigDict()
    c.model.name = "ViT-B-32"  # a preset of disco_jax/models/presets.py, or a model folder
    c.model.activation = ""  # of both towers: gelu, quick_gelu, gelu_tanh; "": the model's own
    c.model.tokenizer = ""  # a tokenizer.json, for SigLIP's models; "": the model's, or CLIP's
    c.model.dtype = "bfloat16"  # the towers' compute: bfloat16 or float32
    # What each tower computes again in the backward pass to save memory, from least to most: none,
    # dots, full or offload (a block's input waits in the host's memory).
    c.model.image_remat = "none"
    c.model.text_remat = "none"

    # `auto`: cuDNN's flash attention in bfloat16 on the GPUs that have it, XLA's elsewhere; or xla,
    # or cudnn. A tower with an odd number of tokens, as CLIP's texts of 77, takes XLA's.
    c.model.attention = "auto"
    c.model.patch_dropout = 0.0  # share of an image's patches left out in training (FLIP)
    c.model.dropout = 0.0  # of what each residual branch adds, in training
    # What is trained of each tower: its last so many blocks with what follows them; 0: nothing, and
    # it needs no gradients (LiT, for the image tower); -1: everything.
    c.model.image_trained_blocks = -1
    c.model.text_trained_blocks = -1

    c.loss = ConfigDict()
    c.loss.kind = (
        "softmax"  # CLIP's; or sigmoid, SigLIP's, with a learnable bias that begins at -10
    )
    c.loss.method = "ring"  # auto, reference, disco, stream or ring (docs/losses.md)

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, lion, adafactor or muon (disco_jax/step/optimizer.py)
    c.optimizer.learning_rate = 5e-4  # after warm-up; falls to 0 along a cosine
    # Updates until then: update n of them has n / warmup_steps of the rate, as in OpenCLIP.
    c.optimizer.warmup_steps = 2_000
    c.optimizer.weight_decay = 0.2  # not of norms, biases, class token and logit_scale
    # Decay of the first moment: of adamw, lion, and muon's AdamW (for what is no matrix; its own
    # momentum is 0.95). adafactor has none.
    c.optimizer.b1 = 0.9
    # Decay of the second: of adamw, lion, and muon's AdamW. adafactor's own approaches 1 as
    # 1 - update**-0.8.
    c.optimizer.b2 = 0.98
    # Added to denominators: of adamw and muon. lion has none, adafactor adds 1e-30 to squares.
    c.optimizer.eps = 1e-6
    c.optimizer.grad_clip_norm = 0.0  # global norm that gradients are clipped to; 0: never

    c.data = ConfigDict()
    # Images and captions: a TFDS data set; tar shards as img2dataset writes them,
    # "/data/{00000..41407}.tar" or "/data/*.tar"; a table of paths and captions, .csv, .tsv or
    # .parquet. Several are joined by "::".
    c.data.name = "shapes"
    c.data.num_samples = 0  # how many there are meant to be, for num_epochs; 0: not told
    c.data.weights = ()  # shares of what is joined, (2.0, 1.0) say; (): all of it is one set
    c.data.split = "train"  # of TFDS data sets
    c.data.dir = "data"  # where TFDS data sets are kept
    c.data.image_key = "image"  # TFDS's feature, a table's column; shards need none
    # TFDS's feature, a table's column; of shards "txt", their text files, or a key of their .json.
    # Of a list of captions one is drawn each time.
    c.data.caption_key = "caption"
    c.data.crop_scale = 0.9  # least share of the area that training's random crop keeps; 1: none
    c.data.num_workers = 8  # processes that decode and tokenise; 0: the main one
    # Seconds without data, from a file system that does not answer say, until the run ends with
    # code 74; the same command goes on.
    c.data.timeout = 600.0
    # What an image may measure. Others are bad samples, as broken ones are: counted, written to
    # bad_samples.jsonl and replaced.
    c.data.max_image_pixels = 100_000_000
    c.data.min_image_side = 4  # pixels
    c.data.max_aspect_ratio = 20.0
    c.data.max_bad_fraction = 0.05  # of all samples (of 1,000 at least): with more, the run stops
    c.data.record_keys = False  # writes the keys of each step's samples to keys.jsonl

    c.eval = ConfigDict()
    c.eval.every = 1_000  # steps between evaluations; the last step has one too; 0: only that
    # Labelled images, by the name of their metrics: `c.eval.sets.mine = zeroshot_set(...)`.
    c.eval.sets = ConfigDict()
    # Images and labels (a TFDS data set and split) from which the accuracy that colours alone give
    # is learned, to compare with; "": not.
    c.eval.baseline_name = ""
    c.eval.baseline_split = "train"
    # Images and captions for retrieval: a source as data.name, or "" for data.name itself; and its
    # split, of a TFDS data set. Neither: no retrieval.
    c.eval.retrieval_name = ""
    c.eval.retrieval_split = ""
    c.eval.retrieval_image_key = "image"  # of retrieval_name, as in `data`
    c.eval.retrieval_caption_key = "caption"  # captions/text for TFDS's coco_captions
    c.eval.batch_size = 1024  # images or texts at once, over all devices

    c.log_every = 50  # steps between lines of metrics
    c.checkpoint_every = 1_000  # steps; the last step is saved too
    c.checkpoint_keep = 3  # newest checkpoints kept
    c.max_bad_steps = 10  # in a row whose loss or gradients are not finite, before the run stops
    c.peer_timeout = 30.0  # seconds without a sign of life of another process before this one ends
    c.start_timeout = 300.0  # seconds for all processes to be there
    c.profile_steps = ""  # a trace of these steps into WORKDIR/profile: "10:15"; "": none
    return c


def zeroshot_set(
    source: str,
    split: str = "test",
    *,
    classes: str = "imagenet",
    templates: str = "openai_imagenet",
    subset: str = "",
    image_key: str = "image",
) -> ConfigDict:
    """One entry of `config.eval.sets`.

    Args:
      source: a TFDS data set; a folder of class folders, named by id, index or class; or tar shards
        whose `.cls` holds the class index.
      split: of a TFDS data set.
      classes: `imagenet`, `shapes`, `tfds` (the data set's own names), or a file of names.
      templates: `openai_imagenet` (CLIP's 80 prompts), `shapes`, or a file of prompts.
      subset: classes that images are told apart among: "" (all), `imagenet_r` (its 200), or a file
        of them; accuracy over all classes is then given as well.
      image_key: the feature of images of a TFDS data set.
    """
    return ConfigDict(
        {
            "source": source,
            "split": split,
            "classes": classes,
            "templates": templates,
            "subset": subset,
            "image_key": image_key,
        }
    )


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"model.name": ...}`: every field by its dotted path."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
