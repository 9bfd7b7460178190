"""Files that survive crashes: atomic writes, checksums, journals of finished blocks, downloaded assets."""
