"""The error of this subpackage."""


class GenerationSetupError(ValueError):
    """A model, device or call that generation cannot be prepared for or run with."""
