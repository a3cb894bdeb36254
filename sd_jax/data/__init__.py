"""Files to batches."""


class DataError(ValueError):
    """Data that cannot be trained on. The message names `data.path`, or the key or file, and the mend."""
