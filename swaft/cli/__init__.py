"""The ``swaft`` program, one file a command."""
