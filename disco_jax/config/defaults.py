"""All configuration fields, with their defaults and meanings.

A config file is a Python file whose `get_config()` starts from `default()` and changes fields.
"""

from typing import Any

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """Returns every field with its default. Sizes are global: over all devices and processes."""
    c = ConfigDict()
    c.seed = 0  # for parameter initialization, sample order, crops and dropout
    c.batch_size = 1024  # samples per step
    # Samples per device in each microbatch; 0 processes the whole batch at once. Microbatches are
    # exact: the towers run on one microbatch at a time, but the loss is computed over the whole
    # batch (disco_jax/step/gradients.py).
    c.microbatch = 0
    # Where a batch's images are held until their microbatch is due: `scan` keeps them on the
    # devices and runs the step as one program; `host` keeps them in host memory, which then limits
    # the batch size.
    c.microbatch_mode = "scan"
    # Dtype in which gradients are summed over the devices, once per step: float32, or bfloat16 for
    # half the communication.
    c.reduce_dtype = "float32"
    # Initial parameters: a model folder (see `python -m disco_jax.interop`) or the workdir of
    # another run; "" for random initialization.
    c.init_from = ""
    # Total number of optimizer updates; 0 computes it from num_epochs, batch_size and the number of
    # samples in the data.
    c.num_steps = 10_000
    # Passes over the data. If num_steps is given too, the two must agree within 5 %. 0: unknown.
    c.num_epochs = 0.0
    c.fsdp = 1  # devices over which each copy of parameters and optimizer state is sharded
    c.fake_devices = 0  # number of simulated CPU devices; 0 uses the machine's own devices

    c.model = ConfigDict()
    c.model.name = "ViT-B-32"  # a preset from disco_jax/models/presets.py, or a model folder
    # Pixels of an image's side and tokens of a text; 0: the model's own. Positions are interpolated
    # if init_from names a model of other sizes.
    c.model.image_size = 0
    c.model.context_length = 0
    c.model.activation = ""  # in both towers: gelu, quick_gelu or gelu_tanh; "": the model's own
    c.model.tokenizer = ""  # a tokenizer.json, for SigLIP models; "": the model's own, or CLIP's
    c.model.dtype = "bfloat16"  # compute dtype of the towers: bfloat16 or float32
    # Rematerialization: what the backward pass recomputes to save memory. From least to most:
    # `none`, `dots` (keeps the outputs of matmuls with weights and of cuDNN's attention),
    # `branches` (keeps the outputs of attention and the MLP's hidden layer), `full` (keeps each
    # block's input), `offload` (as `full`, with the inputs in host memory). `dots:4` is `dots` in
    # the last 4 blocks and `full` in those before, likewise for `none` and `branches`.
    c.model.image_remat = "none"
    c.model.text_remat = "none"
    # Lengths at which shares of each device's (micro)batch of texts are processed, without changing
    # the result: e.g. "16:0.5,32:0.9" is half of them at 16 tokens, up to 90 % at 32, the others at
    # full length. `auto` finds them from a sample of the captions; "" turns this off. SigLIP's text
    # tower attends to its padding and is always processed at full length.
    c.model.text_groups = "auto"
    # Attention implementation: `xla`, `cudnn` (flash attention), or `auto`, which is cudnn in
    # bfloat16 on GPUs that support it and xla elsewhere. For cudnn, towers with an odd number of
    # tokens, such as CLIP's text tower with 77, are padded by one.
    c.model.attention = "auto"
    c.model.patch_dropout = 0.0  # fraction of image patches dropped in training (FLIP)
    c.model.dropout = 0.0  # dropout rate on each residual branch, in training
    # Number of final blocks to train in each tower, along with the layers after them. -1 trains the
    # whole tower; 0 freezes it, so that it needs no gradients (LiT, for the image tower).
    c.model.image_trained_blocks = -1
    c.model.text_trained_blocks = -1

    c.loss = ConfigDict()
    # softmax (CLIP), or sigmoid (SigLIP), which has a learnable bias that is initialized to -10.
    c.loss.kind = "softmax"
    c.loss.method = "default"  # default, auto, reference, disco, stream or ring (docs/losses.md)
    # Bytes per device for logits that `default`, `stream` and `ring` keep for the backward pass; 0
    # computes them twice, in memory linear in the batch size.
    c.loss.keep_bytes = 512 * 2**20
    # Dtype of the features that the loss sends and multiplies: float32, or bfloat16, which halves
    # what is sent of them and, on GPUs, the time of the matmuls. Its error is in docs/losses.md.
    c.loss.dtype = "float32"
    # Precision of the loss's matmuls: default (fp32 features are multiplied in TF32 on NVIDIA GPUs
    # and in bf16 on TPUs), high or highest.
    c.loss.precision = "default"
    # Samples of a batch whose captions have equal tokens are not each other's negatives.
    c.loss.group_equal_captions = False
    # Samples of a batch that are each other's positives, besides each pair: `images`, those of the
    # same image (equal files), such as its several captions; `captions`, those whose captions have
    # equal tokens; "": none.
    c.loss.positives = ""

    c.distill = ConfigDict()
    # A trained model whose features of each batch are distilled: a model folder that reads the same
    # tokens (see `python -m disco_jax.interop`); "": none. For the softmax loss.
    c.distill.teacher = ""
    # Instead of a teacher: a folder of its features of all samples of data.name, which
    # `python -m disco_jax.teach` writes. Of several captions, the first is then always used.
    c.distill.features = ""
    # Weight of the cross-entropies with the teacher's softmax as targets, which are added to the
    # contrastive loss.
    c.distill.weight = 1.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, lion, adafactor or muon (disco_jax/step/optimizer.py)
    c.optimizer.learning_rate = 5e-4  # peak, after warmup; decays to 0 along a cosine
    # Linear warmup: update n uses n / warmup_steps of the peak learning rate, as in OpenCLIP.
    c.optimizer.warmup_steps = 2_000
    c.optimizer.weight_decay = 0.2  # not applied to norms, biases, class token and logit_scale
    # Decay rate of the first moment in adamw, lion, and the AdamW part of muon (everything but the
    # blocks' matrices, whose own momentum is 0.95). adafactor has no first moment.
    c.optimizer.b1 = 0.9
    # Decay rate of the second moment in adamw, lion, and the AdamW part of muon. adafactor uses
    # 1 - update**-0.8 instead.
    c.optimizer.b2 = 0.98
    # Added to denominators in adamw and muon. lion has none; adafactor adds 1e-30 to the squares.
    c.optimizer.eps = 1e-6
    c.optimizer.grad_clip_norm = 0.0  # maximum global gradient norm; 0 disables clipping
    # Factor on the learning rate of each layer of a tower, relative to the layer after it; 1 trains
    # all layers at the same rate.
    c.optimizer.layer_decay = 1.0
    # Decay of an exponential moving average of the parameters, e.g. 0.9998, which then is what is
    # evaluated and exported; 0: no average.
    c.optimizer.ema_decay = 0.0

    c.data = ConfigDict()
    # Images and captions: a TFDS dataset; tar shards as written by img2dataset, e.g.
    # "/data/{00000..41407}.tar" or "/data/*.tar"; or a table of paths and captions (.csv, .tsv or
    # .parquet). Shards and tables may be URLs: s3://, gs://, az://, https://. Join several sources
    # with "::".
    c.data.name = "shapes"
    # Expected dataset size, for checking num_epochs before the data are opened; 0: unknown.
    c.data.num_samples = 0
    # An .npy file of the uids of the samples to use, as DataComp's filters write them, for local
    # tar shards with uids in their .json; "": all samples.
    c.data.subset = ""
    c.data.weights = ()  # mixing proportions of joined sources, e.g. (2.0, 1.0); (): concatenate
    # Order of the samples, a function of the seed (docs/data.md): `global`, a permutation of all
    # samples, each read by itself; `blocks`, which reads `block_size` consecutive samples at once;
    # `auto`, which is blocks if a source is remote and global otherwise.
    c.data.order = "auto"
    # For `blocks`: the samples in a block; how many blocks of a lane are shuffled together, a power
    # of two; and the number of lanes, from which batches take their samples in turn. A batch mixes
    # block_size * window * lanes samples. Lanes should divide batch_size, and the number of
    # processes should divide the lanes: each process then reads lanes of its own.
    c.data.block_size = 1024
    c.data.window = 8
    c.data.lanes = 256
    # Where blocks of remote shards are kept while they are in use: a folder on a local disk; "" is
    # one in the system's folder for temporary files (TMPDIR). If set, blocks of local shards are
    # copied there too, e.g. from a network file system.
    c.data.cache = ""
    c.data.cache_bytes = 0  # that it may take on a host; 0: most of the free space
    c.data.split = "train"  # TFDS split
    c.data.dir = "data"  # folder of the TFDS datasets
    # Folder or URL of the index of shards, also of those of eval, that was written by `python -m
    # disco_jax.data.index --out`; "": it is beside the shards.
    c.data.index = ""
    # TFDS feature or table column, which holds paths or, in Parquet, also encoded images. "auto":
    # "image" or, for tables, another common name (docs/data.md). Not used for tar shards.
    c.data.image_key = "image"
    # TFDS feature or table column. For tar shards: "txt" for the .txt files, or a key of the .json
    # files, such as "title" or the nested "meta.text". "auto": "txt" for tar shards, else "caption"
    # or, for tables, another common name. If a sample has a list of captions, one is drawn at
    # random each time. Join several keys with "::", e.g. "txt::synthetic": one of those that a
    # sample has is drawn each time, by `caption_weights`.
    c.data.caption_key = "caption"
    c.data.caption_weights = ()  # e.g. (0.7, 0.3), of the caption keys; (): equal
    c.data.captions_by_line = False  # whether each line of a text is a separate caption
    # How CSV and TSV tables are written. If empty, the separator (comma, tab, semicolon or bar) and
    # the encoding (UTF-8 or UTF-16) are detected, and quotes are ordinary characters.
    c.data.separator = ""  # "\t" is a tab
    c.data.encoding = ""
    c.data.quote = '"'
    c.data.background = "white"  # laid under transparent images: a CSS name or e.g. "#808080"
    # Whether to turn images upright as their EXIF orientation says. OpenCLIP does not.
    c.data.exif_orientation = False
    c.data.crop_scale = 0.9  # minimum area fraction of the training crop; 1: no random crop
    # Random changes of color in training, as OpenCLIP's `color_jitter` and `gray_scale`, which come
    # after the crop: the strengths of brightness, contrast, saturation and hue (at most 0.5), and
    # the probabilities with which an image's colors are jittered and with which it becomes gray.
    c.data.color_jitter = (0.32, 0.32, 0.32, 0.08)
    c.data.color_jitter_prob = 0.0
    c.data.gray_scale_prob = 0.0
    c.data.num_workers = 8  # worker processes that decode and tokenize; 0: the main process does
    # Seconds without data (e.g. because a file system does not respond) after which the run exits
    # with code 74. Rerunning the same command resumes it.
    c.data.timeout = 600.0
    # Limits on images. Images outside them are bad samples, like broken ones: they are counted,
    # recorded in bad_samples.jsonl and replaced.
    c.data.max_image_pixels = 100_000_000
    c.data.min_image_side = 4  # pixels
    c.data.max_aspect_ratio = 20.0
    c.data.max_bad_fraction = 0.05  # bad samples, of at least 1,000, above which the run stops
    c.data.record_keys = False  # write the sample keys of each step to keys.jsonl

    c.eval = ConfigDict()
    # Steps between evaluations; 0 for none. The last step is always evaluated.
    c.eval.every = 1_000
    # Labeled datasets for zero-shot classification, e.g. `c.eval.sets.mine = zeroshot_set(...)`.
    # The name of a set is the prefix of its metrics.
    c.eval.sets = ConfigDict()
    # "clip": also evaluates the 16 sets of CLIP's and VTAB's evaluations that docs/evaluation.md
    # lists, as far as they are in data.dir, and their mean.
    c.eval.suite = ""
    # Labeled images (a TFDS dataset and split) for fitting a baseline that sees only colors; "": no
    # baseline.
    c.eval.baseline_name = ""
    c.eval.baseline_split = "train"
    # Images and captions for retrieval: a source as in data.name ("": data.name itself) and its
    # TFDS split. If both are empty, retrieval is not evaluated.
    c.eval.retrieval_name = ""
    c.eval.retrieval_split = ""
    c.eval.retrieval_image_key = "image"  # for retrieval_name, as data.image_key
    c.eval.retrieval_caption_key = "caption"  # e.g. captions/text for TFDS's coco_captions
    c.eval.retrieval_captions_by_line = False  # for retrieval_name, e.g. CLIP_benchmark's shards
    c.eval.batch_size = 1024  # images or texts per batch

    c.log_every = 50  # steps between metrics
    # Project of Weights & Biases that also gets the metrics (pip install wandb); "": none.
    c.wandb = ""
    c.checkpoint_every = 1_000  # steps between checkpoints; the last step is always saved
    c.checkpoint_keep = 3  # number of most recent checkpoints to keep
    # Folder for the local copies of a run whose workdir is a URL; "": one in ~/.cache/disco_jax.
    c.workdir_cache = ""
    c.max_bad_steps = 10  # consecutive steps with non-finite loss or gradients that stop the run
    c.peer_timeout = 30.0  # seconds without a heartbeat after which another process counts as lost
    c.start_timeout = 300.0  # seconds to wait for all processes to start
    # Seconds without a finished step after which a run counts as hanging and exits with code 76; 0:
    # never. Waiting for data, compiling and evaluating don't count.
    c.stall_timeout = 1800.0
    c.profile_steps = ""  # steps to trace, e.g. "10:15", into WORKDIR/profile; "": none
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
    """Returns one entry of `config.eval.sets`.

    Args:
      source: A TFDS dataset; a folder with one folder per class, named by id, index or class name;
        or tar shards whose `.cls` members hold the class index, id or name.
      split: The split of a TFDS dataset.
      classes: `imagenet`, `shapes`, a set of the suite (e.g. `food101`), `tfds` (the dataset's own
        class names), or a file of names.
      templates: `openai_imagenet` (CLIP's 80 prompts), `shapes`, a set of the suite, or a file of
        prompts.
      subset: The classes to choose among: "" (all), `imagenet_r` (its 200), or a file of classes.
        With a subset, accuracy among all classes is reported as well.
      image_key: The image feature of a TFDS dataset.
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
    """Returns all fields by dotted path: `{"model.name": ...}`."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
