"""Language models: load one, capture its activations, splice transcoders into it, read its unembedding.

The only package that imports transformers or transformer_lens, and only inside functions, since that takes seconds.
"""

from matryoshka.lm.model import LanguageModel

__all__ = ["LanguageModel"]
