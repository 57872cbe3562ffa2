"""Files and folders: written whole or not at all, and read back."""

from liar.io.atomic import check_file, check_target
from liar.io.checkpoint import load, load_tokenizer, save, versions

__all__ = ["check_file", "check_target", "load", "load_tokenizer", "save", "versions"]
