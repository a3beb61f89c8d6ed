"""Collects this folder only for a run that asks for it with `-m parity`, and then needs torch."""


def pytest_ignore_collect(collection_path, config):
    """Without `-m parity` no file here is imported, so that the ordinary run needs no torch.

    With it nothing is skipped: a missing package is an error of collection.
    """
    asked = "parity" in config.option.markexpr.replace("not parity", "")
    return None if asked else True
