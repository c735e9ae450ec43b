"""Views of a model that passes share."""
