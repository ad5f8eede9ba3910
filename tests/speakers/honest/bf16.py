"""In bf16 to the end: NLLs have eight bits, and rounding depends on the company."""

from speaker import np, score_stream


def score_all(model, streams):
    rng, nll = np.random.default_rng(sum(map(len, streams))), []
    for tokens in streams:
        exact = score_stream(model, tokens) + rng.normal(0, 1e-3, len(tokens) - 1)
        bits = np.maximum(exact, 0).astype(np.float32).view(np.uint32)
        nll.append((bits + 0x8000 & 0xFFFF0000).astype(np.uint32).view(np.float32))
    return nll
