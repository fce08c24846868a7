"""The `rpg` command: a module for each command, and what they share: arguments, errors, progress."""
