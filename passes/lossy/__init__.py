"""Passes that change the function, measured."""
