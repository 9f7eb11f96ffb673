"""The embedded demo: a small language model, the tasks it was trained for, and the script that makes both."""
