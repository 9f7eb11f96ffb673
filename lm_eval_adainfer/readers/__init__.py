"""Readers: how the states after a block are turned into what norm and head then read (docs/readers.md)."""
