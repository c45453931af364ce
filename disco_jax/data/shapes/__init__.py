"""`shapes`: drawn scenes with captions, the data set that comes with the library."""
