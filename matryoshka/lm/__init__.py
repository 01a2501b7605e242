"""Language models: load one, capture its activations, splice transcoders into it, read its unembedding.

The only package that imports transformer_lens; and transformers, but for the tokenizers of matryoshka/tokens.py. Both
only inside functions, since that takes seconds.
"""

from matryoshka.lm.model import LanguageModel

__all__ = ["LanguageModel"]
