"""Files and folders: written whole or not at all, and read back."""

from liar.io.folders import check_file, check_target
from liar.io.load import load, load_tokenizer, model_from_config
from liar.io.save import save
from liar.io.standalone import make_standalone

__all__ = ["check_file", "check_target", "load", "load_tokenizer", "make_standalone", "model_from_config", "save"]
