"""Files that are complete or absent, every byte accounted for. Knows nothing of averaging or training."""

from swaft.storage.files import FileRecord, sync_file, sync_folder, sync_tree, write_durably
from swaft.storage.hashing import BLOCK_BYTES, BlockHasher, hash_file
from swaft.storage.sealed import Manifest, is_complete, read_manifest, remove_sealed, seal, verify
from swaft.storage.tensor_file import Spec, TensorFile, write_tensors

__all__ = [
    "BLOCK_BYTES",
    "BlockHasher",
    "FileRecord",
    "Manifest",
    "Spec",
    "TensorFile",
    "hash_file",
    "is_complete",
    "read_manifest",
    "remove_sealed",
    "seal",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "verify",
    "write_durably",
    "write_tensors",
]
