"""Builds what DeepSpeed compiles at its first start without CUDA: a killed build makes later starts wait forever.

DeepSpeed compiles ``deepspeed_shm_comm`` for one to two minutes when the process group starts. Ranks that start
together wait on a ``lock`` file in the build folder, which a killed build leaves behind
(pytorch/pytorch#189245). Run once, in a single process, after installing:

    python -m swaft.training.launch.deepspeed_extension

and recipes call `refuse_left_locks` before DeepSpeed starts.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from swaft.errors import TrainingError

logger = logging.getLogger(__name__)

EXTENSION = "deepspeed_shm_comm"
STALE_AFTER_S = 600.0
"""Age from which a lock that no process of this machine holds counts as left behind."""


def use_environment() -> None:
    """Keep extensions, and find the build tool, inside the running virtual environment.

    The binary fits only the torch it was compiled against, so it belongs in the environment with that
    torch, not in the cache folder shared by all of a user's environments, unless the user may not write there;
    ``TORCH_EXTENSIONS_DIR`` overrides this. torch looks for ``ninja`` on the path even if nothing is left to build,
    and an environment whose Python is called by its full path is not on it. It is put first: a ``ninja`` of another
    version takes everything this one has built for out of date, and compiles it again. Outside a virtual
    environment nothing is changed.
    """
    if sys.prefix != sys.base_prefix:
        home = Path(sys.prefix) / "torch_extensions"
        if os.access(home if home.exists() else sys.prefix, os.W_OK):
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(home))
        tools, others = str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)
        if others.split(os.pathsep)[0] != tools:
            os.environ["PATH"] = os.pathsep.join([tools, others])


def build_folder(extension: str = EXTENSION) -> Path:
    """Return the folder in which torch builds an extension (created if missing)."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(extension, verbose=False))


def reason_op_cannot_be_built(op: str) -> str | None:
    """Return why an op such as ``cpu_adam``, which DeepSpeed compiles when used, is unavailable; or None."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    use_environment()
    if installed_ops.get(op):
        return None
    if not is_ninja_available():
        return "ninja is not installed here (pip install ninja)"
    if (build_folder(op) / f"{op}.so").exists() or shutil.which(get_cxx_compiler().split()[0]):
        return None
    return f"there is no C++ compiler {get_cxx_compiler()} here; install one, or set CXX to one"


def locks_by_existing() -> bool:
    """Whether a lock is the file itself. From torch 2.14 on the file stays, and the kernel frees a dead build's."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton")


def is_held(lock: Path) -> bool:
    """Whether a running process of this machine holds ``lock``: torch keeps the file open while it builds."""
    target = os.path.realpath(lock)
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if any(os.path.realpath(descriptor) == target for descriptor in descriptors.iterdir()):
                return True
    return False


def refuse_stale_lock(folder: Path) -> None:
    """Raise if a lock left by a killed build would make DeepSpeed wait forever.

    A lock that no process here holds counts as left behind from `STALE_AFTER_S` on; a younger one may belong to
    another machine that shares the folder.

    Raises:
        TrainingError: names the file to delete.
    """
    lock = folder / "lock"
    if not locks_by_existing():
        return
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return
    if age_s > STALE_AFTER_S and not is_held(lock):
        raise TrainingError(
            f"DeepSpeed would wait for ever: {lock} is {age_s / 60:.0f} minutes old and no running build "
            "holds it. A killed build left it behind. Delete that file, then run "
            f"`python -m swaft.training.launch.deepspeed_extension` once."
        )


def refuse_left_locks(*, offloads_optimizer: bool) -> None:
    """Raise if DeepSpeed would wait on this machine for a killed build; the error names the file to delete.

    With ``offloads_optimizer`` DeepSpeed uses its optimizer for the host, which it compiles too.
    """
    use_environment()
    if reason_not_to_build() is None:
        refuse_stale_lock(build_folder())
    if offloads_optimizer:
        refuse_stale_lock(build_folder("cpu_adam"))


def remove_left_behind_lock(folder: Path) -> bool:
    """Delete the lock of a killed build, but not of a running one. Returns whether a file was deleted."""
    lock = folder / "lock"
    if not locks_by_existing() or not lock.exists() or is_held(lock):
        return False
    lock.unlink(missing_ok=True)
    logger.warning("deleted %s, left behind by a killed build", lock)
    return True


def reason_not_to_build() -> str | None:
    """Return why there is nothing to build on this machine, or None if there is."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    if sys.platform != "linux":
        return "DeepSpeed uses plain gloo on this platform"
    import torch

    return "CUDA is present, DeepSpeed communicates through NCCL" if torch.cuda.is_available() else None


def main() -> int:
    """Build the extension in this single process, or say why there is nothing to build. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reason = reason_not_to_build()
    if reason:
        logger.info("nothing to build: %s", reason)
        return 0
    use_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = build_folder()
    remove_left_behind_lock(folder)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    started = time.monotonic()
    ShareMemCommBuilder().load(verbose=False)
    logger.info("%s is ready in %s (%.0f s)", EXTENSION, folder, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
