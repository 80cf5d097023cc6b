"""The terminal: commands, tables, progress."""
