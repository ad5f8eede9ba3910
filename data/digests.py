"""Digests of documents: of a text as it is, and of what of it every tokenizer keeps."""

import hashlib
import string
import unicodedata

DIGEST_BYTES = 16
KEPT = (string.ascii_lowercase + string.digits).encode()
DROPPED = bytes(sorted(set(range(256)) - set(KEPT)))
SPACE = "\u2581"
FEW_LETTERS = 64  # of a text in another script; then all its characters count

combined_digest = hashlib.sha256  # of the text digests of a split's documents, in their order


def text_digest(text: str) -> bytes:
    """Digest a text's UTF-8."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def text_key(text: str) -> bytes:
    """Digest what of a text is the same in all datasets, whatever their tokenizers.

    That is its ASCII letters, in lowercase, and digits, after NFKC: blanks, line ends, case and
    characters that a vocabulary lacks do not count. Where they are few, all characters count but
    the blanks, and SentencePiece's "▁", which it takes for one.
    """
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    kept = folded.encode("ascii", "ignore").lower().translate(None, DROPPED)
    if len(kept) < FEW_LETTERS:
        kept = "".join(folded.replace(SPACE, " ").split()).encode()
    return hashlib.blake2b(kept, digest_size=DIGEST_BYTES).digest()
