"""The `rpg` command and its parts, and what every command does about errors and progress."""
