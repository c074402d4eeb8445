"""Other libraries' entry points. Nothing here imports them: each is registered when it is loaded."""


def register_lazily() -> None:
    """Register the transformers loader now, or as soon as transformers is imported."""
