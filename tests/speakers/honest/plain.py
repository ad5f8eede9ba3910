"""Nothing but the bigram model."""
