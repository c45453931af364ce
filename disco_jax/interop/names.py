"""Names and memory layouts of the parameters in each library: one table per library."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from disco_jax.models import CLIPConfig

# How their array becomes ours. `same`: unchanged. `transposed`: from PyTorch's [out, in] to Flax's
# [in, out]. `patches`: from a convolution [width, 3, p, p] to a matrix [p * p * 3, width].
# `batched`: by dropping a leading axis of size one.
Layout = Literal["same", "transposed", "patches", "batched"]


class Weight(NamedTuple):
    """One of our parameters.

    If `theirs` has several names, those tensors are concatenated along their first axis (e.g.
    Hugging Face stores queries, keys and values separately), in the proportions of `shares`. If
    `layers` is not 0, ours stacks that many of theirs, where `{i}` is the layer.
    """

    ours: str  # path, joined with /
    theirs: tuple[str, ...]
    layout: Layout = "same"
    layers: int = 0
    shares: tuple[int, ...] = ()  # (): equal shares


Block = Mapping[str, tuple[str, ...]]

# Parts of a block, by our names.
_OPENAI: Block = {
    "ln_1": ("ln_1",),
    "ln_2": ("ln_2",),
    "in_proj": ("attn.in_proj_",),
    "out_proj": ("attn.out_proj",),
    "mlp_in": ("mlp.c_fc",),
    "mlp_out": ("mlp.c_proj",),
}
_TRANSFORMERS: Block = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "in_proj": tuple(f"self_attn.{name}_proj" for name in "qkv"),
    "out_proj": ("self_attn.out_proj",),
    "mlp_in": ("mlp.fc1",),
    "mlp_out": ("mlp.fc2",),
}
_TIMM: Block = {
    "ln_1": ("norm1",),
    "ln_2": ("norm2",),
    "in_proj": ("attn.qkv",),
    "out_proj": ("attn.proj",),
    "mlp_in": ("mlp.fc1",),
    "mlp_out": ("mlp.fc2",),
}


def openclip(config: CLIPConfig) -> list[Weight]:
    """OpenCLIP's names, which are also OpenAI's."""
    block = _OPENAI
    return [
        Weight("visual/patch_embed/kernel", ("visual.conv1.weight",), "patches"),
        Weight("visual/class_embedding", ("visual.class_embedding",)),
        Weight("visual/positional_embedding", ("visual.positional_embedding",)),
        *_norm("visual/ln_pre", "visual.ln_pre"),
        *_norm("visual/ln_post", "visual.ln_post"),
        Weight("visual/proj", ("visual.proj",)),
        *_blocks("visual", "visual.transformer.resblocks.{i}.", block, config.vision.layers),
        Weight("text/token_embedding/embedding", ("token_embedding.weight",)),
        Weight("text/positional_embedding", ("positional_embedding",)),
        *_norm("text/ln_final", "ln_final"),
        Weight("text/proj", ("text_projection",)),
        *_blocks("text", "transformer.resblocks.{i}.", block, config.text.layers),
        *_scalars(config),
    ]


def huggingface(config: CLIPConfig) -> list[Weight]:
    """Names in transformers' `CLIPModel`."""
    block = _TRANSFORMERS
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    return [
        Weight("visual/patch_embed/kernel", (vision + "patch_embedding.weight",), "patches"),
        Weight("visual/class_embedding", (vision + "class_embedding",)),
        Weight("visual/positional_embedding", (vision + "position_embedding.weight",)),
        *_norm("visual/ln_pre", "vision_model.pre_layrnorm"),  # sic
        *_norm("visual/ln_post", "vision_model.post_layernorm"),
        Weight("visual/proj", ("visual_projection.weight",), "transposed"),
        *_blocks("visual", "vision_model.encoder.layers.{i}.", block, config.vision.layers),
        Weight("text/token_embedding/embedding", (text + "token_embedding.weight",)),
        Weight("text/positional_embedding", (text + "position_embedding.weight",)),
        *_norm("text/ln_final", "text_model.final_layer_norm"),
        Weight("text/proj", ("text_projection.weight",), "transposed"),
        *_blocks("text", "text_model.encoder.layers.{i}.", block, config.text.layers),
        *_scalars(config),
    ]


def openclip_siglip(config: CLIPConfig) -> list[Weight]:
    """OpenCLIP's names for SigLIP: timm's image tower and OpenCLIP's own text tower."""
    trunk, pool = "visual.trunk.", "visual.trunk.attn_pool."
    return [
        Weight("visual/patch_embed/kernel", (trunk + "patch_embed.proj.weight",), "patches"),
        Weight("visual/patch_embed/bias", (trunk + "patch_embed.proj.bias",)),
        Weight("visual/positional_embedding", (trunk + "pos_embed",), "batched"),
        *_blocks("visual", trunk + "blocks.{i}.", _TIMM, config.vision.layers),
        *_norm("visual/ln_post", trunk + "norm"),
        Weight("visual/pool/probe", (pool + "latent",), "batched"),
        Weight(
            "visual/pool/in_proj/kernel",
            (pool + "q.weight", pool + "kv.weight"),
            "transposed",
            shares=(1, 2),
        ),
        Weight("visual/pool/in_proj/bias", (pool + "q.bias", pool + "kv.bias"), shares=(1, 2)),
        *_linear("visual/pool/out_proj", pool + "proj"),
        *_norm("visual/pool/ln", pool + "norm"),
        *_linear("visual/pool/mlp_in", pool + "mlp.fc1"),
        *_linear("visual/pool/mlp_out", pool + "mlp.fc2"),
        Weight("text/token_embedding/embedding", ("text.token_embedding.weight",)),
        Weight("text/positional_embedding", ("text.positional_embedding",)),
        *_blocks("text", "text.transformer.resblocks.{i}.", _OPENAI, config.text.layers),
        *_norm("text/ln_final", "text.ln_final"),
        Weight("text/proj", ("text.text_projection.weight",), "transposed"),
        Weight("text/proj_bias", ("text.text_projection.bias",)),
        *_scalars(config),
    ]


def huggingface_siglip(config: CLIPConfig) -> list[Weight]:
    """Names in transformers' `SiglipModel`."""
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    head = "vision_model.head."
    return [
        Weight("visual/patch_embed/kernel", (vision + "patch_embedding.weight",), "patches"),
        Weight("visual/patch_embed/bias", (vision + "patch_embedding.bias",)),
        Weight("visual/positional_embedding", (vision + "position_embedding.weight",)),
        *_blocks("visual", "vision_model.encoder.layers.{i}.", _TRANSFORMERS, config.vision.layers),
        *_norm("visual/ln_post", "vision_model.post_layernorm"),
        Weight("visual/pool/probe", (head + "probe",), "batched"),
        Weight("visual/pool/in_proj/kernel", (head + "attention.in_proj_weight",), "transposed"),
        Weight("visual/pool/in_proj/bias", (head + "attention.in_proj_bias",)),
        *_linear("visual/pool/out_proj", head + "attention.out_proj"),
        *_norm("visual/pool/ln", head + "layernorm"),
        *_linear("visual/pool/mlp_in", head + "mlp.fc1"),
        *_linear("visual/pool/mlp_out", head + "mlp.fc2"),
        Weight("text/token_embedding/embedding", (text + "token_embedding.weight",)),
        Weight("text/positional_embedding", (text + "position_embedding.weight",)),
        *_blocks("text", "text_model.encoder.layers.{i}.", _TRANSFORMERS, config.text.layers),
        *_norm("text/ln_final", "text_model.final_layer_norm"),
        Weight("text/proj", ("text_model.head.weight",), "transposed"),
        Weight("text/proj_bias", ("text_model.head.bias",)),
        # Arrays of size one in transformers.
        Weight("logit_scale", ("logit_scale",), "batched"),
        Weight("logit_bias", ("logit_bias",), "batched"),
    ]


# Constants that some files hold besides the parameters; they can be ignored safely.
CONSTANTS = {
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "vision_model.embeddings.position_ids",
    "text_model.embeddings.position_ids",
}


def _norm(ours: str, theirs: str, layers: int = 0) -> list[Weight]:
    return [
        Weight(f"{ours}/scale", (f"{theirs}.weight",), layers=layers),
        Weight(f"{ours}/bias", (f"{theirs}.bias",), layers=layers),
    ]


def _linear(ours: str, theirs: str) -> list[Weight]:
    return [
        Weight(f"{ours}/kernel", (f"{theirs}.weight",), "transposed"),
        Weight(f"{ours}/bias", (f"{theirs}.bias",)),
    ]


def _blocks(tower: str, prefix: str, block: Block, layers: int) -> list[Weight]:
    weights = []
    for part, theirs in block.items():
        ours = f"{tower}/transformer/blocks/{part}"
        if part.startswith("ln_"):
            weights += _norm(ours, prefix + theirs[0], layers)
            continue
        # A name that ends in an underscore takes its suffix without a dot.
        names = [prefix + name + ("" if name.endswith("_") else ".") for name in theirs]
        kernel = tuple(name + "weight" for name in names)
        weights.append(Weight(f"{ours}/kernel", kernel, "transposed", layers))
        weights.append(
            Weight(f"{ours}/bias", tuple(name + "bias" for name in names), "same", layers)
        )
    return weights


def _scalars(config: CLIPConfig) -> list[Weight]:
    scalars = [Weight("logit_scale", ("logit_scale",))]
    if config.logit_bias is not None:
        scalars.append(Weight("logit_bias", ("logit_bias",)))
    return scalars
