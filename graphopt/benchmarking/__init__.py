"""Models timed side by side, and what their time goes to."""
