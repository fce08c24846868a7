"""Measurements of the service: a real `rpg serve` on a Ray of its own, called through `rpg.client`."""
