"""Local and remote files: URLs, object stores, and downloads."""
