"""What every block said, recorded on documents: the file, one view of it, and replay."""
