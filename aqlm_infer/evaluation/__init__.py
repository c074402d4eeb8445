"""Load a model and score it: what the command line and the demo measure quality with.

``evaluation.generation`` writes text and times it; it is not imported here, because it imports
transformers.
"""

from .loading import DTYPES, ModelError, load_model, load_tokenizer, resolve_model, set_precision
from .perplexity import Perplexity, perplexity
from .tokens import TokenError, read_text_file, read_token_file

__all__ = [
    "DTYPES",
    "ModelError",
    "Perplexity",
    "TokenError",
    "load_model",
    "load_tokenizer",
    "perplexity",
    "read_text_file",
    "read_token_file",
    "resolve_model",
    "set_precision",
]
