"""One file per family. Each defines `FAMILIES`, a tuple of tables; the registry finds every file in this folder."""
