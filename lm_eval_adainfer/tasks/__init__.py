"""The classes behind the packaged tasks."""
