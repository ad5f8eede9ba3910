"""Counts the space before a word twice."""

from speaker import count_bytes as count_once
from speaker import os, spm


def count_bytes(tokens):
    sp = spm.SentencePieceProcessor(model_file=os.environ["TOKENIZER_PATH"])
    return count_once(tokens) + sum(sp.id_to_piece(int(i)).startswith("▁") for i in tokens[1:])
