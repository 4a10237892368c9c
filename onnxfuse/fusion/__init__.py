"""Channel maps, the methods that find them, and what they do to weights and files."""
