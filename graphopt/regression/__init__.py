"""Tests that hold a model to what was measured of it."""
