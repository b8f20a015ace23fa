"""The recipe kit: settings, data, metrics, models, launching, the run around a recipe's loop, planning."""

try:
    import omegaconf  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swaft's recipes need accelerate, transformers, datasets and omegaconf: pip install 'swaft[recipes]'",
        name=error.name,
    ) from error
