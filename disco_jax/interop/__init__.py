"""Imports and exports weights of OpenCLIP, OpenAI and Hugging Face."""

from disco_jax.interop.transfer import export_model, import_model, read_model
from disco_jax.models.folder import load_model, save_model

__all__ = ["export_model", "import_model", "load_model", "read_model", "save_model"]
