"""Makes torch_*.pt, as trainers leave their weights, and a SigLIP's features with other epsilons.

pip install -r requirements-bench.txt
PYTHONPATH=. python benchmarks/golden_torch.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel

GOLDEN = Path("tests/golden")
NUMBERS = torch.arange(24, dtype=torch.float32)


class Inner(torch.nn.Module):
    """A module with a parameter in half precision and a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(NUMBERS[:6].reshape(2, 3).half())
        self.register_buffer("count", torch.tensor(4))

    def forward(self, x: torch.Tensor):
        """Returns something: TorchScript needs it."""
        return x


class Outer(torch.nn.Module):
    """A module of modules, with an attribute that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.visual = Inner()
        self.blocks = torch.nn.ModuleList([Inner()])
        self.scale = torch.nn.Parameter(torch.tensor(2.5))
        self.size = 224

    def forward(self, x: torch.Tensor):
        """Returns something: TorchScript needs it."""
        return self.visual(x)


def checkpoint() -> dict:
    """A dict like OpenCLIP's, with tensors of all kinds and NumPy scalars in the optimizer."""
    state = {
        "whole": NUMBERS[:6].reshape(2, 3).clone(),
        "view": NUMBERS[4:16].reshape(3, 4).t(),
        "half": torch.tensor([0.5, -2.0]).half(),
        "bfloat16": torch.tensor([1.5, -3.0]).bfloat16(),
        "double": torch.tensor(7.25, dtype=torch.float64),
        "integer": torch.tensor([1, 2]),
        "parameter": torch.nn.Parameter(torch.tensor([9.0])),
        "flags": torch.tensor([True, False]),
    }
    group = {"lr": np.float64(1e-3), "betas": (0.9, np.float32(0.98))}
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": moments, "param_groups": [group]},
        "scaler": {"_growth_tracker": np.int64(2)},
    }


def siglip(image_eps: float, text_eps: float) -> dict[str, torch.Tensor]:
    """Returns the features of siglip_tiny with other epsilons in its LayerNorms."""
    spec = json.loads((GOLDEN / "siglip_tiny" / "config.json").read_text())
    spec["vision_config"]["layer_norm_eps"] = image_eps
    spec["text_config"]["layer_norm_eps"] = text_eps
    model = SiglipModel(SiglipConfig(**spec)).eval()
    model.load_state_dict(load_file(GOLDEN / "siglip_tiny" / "model.safetensors"))
    io = load_file(GOLDEN / "siglip_tiny.io.safetensors")
    with torch.no_grad():
        return {
            "image_features": model.get_image_features(io["images_nchw"]).pooler_output,
            "text_features": model.get_text_features(io["tokens"]).pooler_output,
        }


def main() -> None:
    torch.save(checkpoint(), GOLDEN / "torch_checkpoint.pt")
    torch.jit.save(torch.jit.script(Outer()), GOLDEN / "torch_script.pt")
    save_file(siglip(1e-2, 3e-2), GOLDEN / "siglip_tiny_eps.io.safetensors")


if __name__ == "__main__":
    main()
