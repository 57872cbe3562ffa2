"""Where the texts of the benchmarks come from: data sets of the Hugging Face hub, or the same as files of a folder.

    rows = read(None, "sst2/dev")                   # from the hub
    rows = read(Path("../shared/data"), "sst2/dev") # from FOLDER/sst2/dev.jsonl.gz

Files are JSON lines (gzip) with the hub's columns, or plain text (gzip). Where a folder has a part of a split only, the table
says so by the name of its file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        hub: its repository.
        config: its configuration there, None if it has one only.
        split: its name there; a slice takes the beginning.
        file: in a data folder; None where folders are not expected to have it.
        part: (data folder, rows of the file) -> the rows of this split, where a file has several.
        data_files: the file of the repository that is read, where all of them are too many.
    """

    hub: str
    config: str | None
    split: str
    file: str | None = None
    part: Callable[[Path, Dataset], Dataset] | None = None
    data_files: str | None = None

    def from_hub(self) -> Dataset:
        """The rows as the hub has them, or its cache."""
        return load_dataset(self.hub, self.config, split=self.split, data_files=self.data_files)

    def from_folder(self, folder: Path) -> Dataset:
        """The rows of the file."""
        if self.file is None:
            raise FileNotFoundError(f"no file of {self.hub} {self.config or ''} {self.split} is expected in a data folder")
        path = folder / self.file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        # Lines of a text keep their ends, as the hub's do.
        how = {"keep_linebreaks": True} if ".txt" in path.suffixes else {}
        rows = load_dataset("text" if how else "json", data_files=str(path), split="train", **how)
        return rows if self.part is None else self.part(folder, rows)


def _of_articles(folder: Path, rows: Dataset, *, held_out: bool) -> Dataset:
    """The questions of the articles that are held out, or of the others: a folder has no train split of SQuAD."""
    titles = set(json.loads((folder / "squad_v1.1/heldout_titles.json").read_text(encoding="utf-8")))
    return rows.select([number for number, title in enumerate(rows["title"]) if (title in titles) is held_out])


def _glue(task: str, dev: str = "validation", train: str | None = None, *, files: bool = True) -> dict[str, Split]:
    name = dev.removeprefix("validation").replace("_", "-")
    train = train or f"{task}/train.jsonl.gz"
    return {
        f"{task}/train": Split("nyu-mll/glue", task, "train", train if files else None),
        f"{task}/dev{name}": Split("nyu-mll/glue", task, dev, f"{task}/dev{name}.jsonl.gz" if files else None),
    }


DATA: dict[str, Split] = {
    **_glue("cola"),
    **_glue("sst2"),
    **_glue("mrpc"),
    **_glue("qqp"),
    **_glue("stsb"),
    **_glue("mnli", "validation_matched"),
    **_glue("mnli", "validation_mismatched"),
    **_glue("qnli", train="qnli/train_part.jsonl.gz"),
    **_glue("rte"),
    **_glue("wnli"),
    "squad/train": Split("rajpurkar/squad", None, "train", "squad_v1.1/dev.jsonl.gz", partial(_of_articles, held_out=False)),
    "squad/dev": Split("rajpurkar/squad", None, "validation", "squad_v1.1/dev.jsonl.gz", partial(_of_articles, held_out=True)),
    "squad_v2/dev": Split("rajpurkar/squad_v2", None, "validation", "squad_v2.0/dev.jsonl.gz"),
    "wikitext/train": Split("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "wikitext2/raw_train_first_1MB.txt.gz"),
    "wikitext/test": Split("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "wikitext2/raw_test.txt.gz"),
    # The file that pruning papers calibrate on.
    "c4": Split("allenai/c4", None, "train[:2000]", "c4/sample.jsonl.gz", data_files="en/c4-train.00000-of-01024.json.gz"),
    "tinystories/train": Split("roneneldan/TinyStories", None, "train[:2000]", "tinystories/train_part.jsonl.gz"),
    "tinystories/test": Split("roneneldan/TinyStories", None, "validation[:232]", "tinystories/holdout_part.jsonl.gz"),
}


@cache
def read(data_dir: Path | None, name: str) -> Any:
    """The rows of a split, as a `datasets` data set: of a folder, or of the hub where none is given.

    Raises:
        SystemExit: neither can be read; the message says what to do.
    """
    split = DATA[name]
    if data_dir is not None:
        try:
            return split.from_folder(data_dir)
        except FileNotFoundError as error:
            raise SystemExit(f"{error}; leave --data-dir out to read {split.hub} from the hub") from error
    try:
        return split.from_hub()
    except (OSError, ValueError) as error:
        what = " ".join(filter(None, (split.hub, split.config, split.split)))
        remedy = f"pass --data-dir FOLDER with {split.file} in it" if split.file else "fetch it once with a connection"
        raise SystemExit(f"cannot read {what} from the Hugging Face hub ({error}): go online, or {remedy}") from error
