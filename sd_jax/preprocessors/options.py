"""What the preprocessors ask of their options."""


def within(least: float | int, most: float | int, **values: float | int) -> None:
    """Raises ValueError that names the first of `values` which is not in least..most, ends included."""
    for name, value in values.items():
        if not least <= value <= most:  # nor is NaN
            raise ValueError(f"{name}={value}: give a number from {least} to {most}")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Raises ValueError that names the first of `values` which is none of `choices`."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r}: give {' or '.join(choices)}")
