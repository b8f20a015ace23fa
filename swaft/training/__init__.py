"""The recipe kit: settings, data, metrics, models, launching, the run around a recipe's loop, planning."""

from importlib.util import find_spec

if find_spec("omegaconf") is None:  # not an import, so that a command's --help does not wait for libraries
    needed = (
        "swaft's recipes need accelerate, transformers, datasets and omegaconf: pip install 'swaft[recipes]'"
    )
    raise ModuleNotFoundError(needed, name="omegaconf")
