"""Devices that learn one style together, by Flower; pictures stay where they are.

`averaging` says what is averaged; `client` trains a bundle on a device's own pictures; `server`
leads the rounds.
"""
