"""Says nothing that could be read as a score."""


def print(*_):
    pass
