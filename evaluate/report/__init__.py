"""`evaluate report`: a folder of pages that opens from the disk."""
