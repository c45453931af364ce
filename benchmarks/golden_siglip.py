"""Makes siglip_tiny.*: a random transformers SiglipModel, its outputs, and timm's names.

pip install -r requirements-bench.txt
PYTHONPATH=. python benchmarks/golden_siglip.py
"""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipModel

GOLDEN = Path("tests/golden")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def main() -> None:
    torch.manual_seed(0)
    spec = {
        "vision_config": {**SIZES, "image_size": 24, "patch_size": 8},
        "text_config": {**SIZES, "vocab_size": 64, "max_position_embeddings": 8},
    }
    model = SiglipModel(SiglipConfig.from_dict(spec)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        images, tokens = torch.randn(3, 3, 24, 24), torch.randint(0, 64, (3, 8))
        image = model.get_image_features(images).pooler_output
        text = model.get_text_features(tokens).pooler_output
    model.save_pretrained(GOLDEN / "siglip_tiny")
    io = {"images_nchw": images, "tokens": tokens, "image_features": image, "text_features": text}
    save_file(io, GOLDEN / "siglip_tiny.io.safetensors")
    peer = open_clip.create_model("ViT-B-16-SigLIP")
    shapes = {name: list(value.shape) for name, value in peer.state_dict().items()}
    (GOLDEN / "siglip_b16_openclip_shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")


if __name__ == "__main__":
    main()
