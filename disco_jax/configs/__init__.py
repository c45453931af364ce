"""The configs that come with the package, found by their names: `--config=shapes`.

Each is a file with a `get_config()` and a docstring that says what it is for.
"""
