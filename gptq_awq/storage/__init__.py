"""Files that survive: atomic writes, checksums, journals of finished blocks, downloaded assets."""
