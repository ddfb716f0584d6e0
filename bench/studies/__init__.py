"""Studies: one file each: run, table and picture."""
