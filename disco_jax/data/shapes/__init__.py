"""`shapes`: a dataset of drawn scenes with captions, bundled with the library."""
