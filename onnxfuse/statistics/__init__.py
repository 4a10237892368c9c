"""What is known about channels: the one thing that importances, ground costs and maps may look at."""
