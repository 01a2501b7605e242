"""`evaluate faithfulness`: the language model's loss with the transcoder spliced in."""
