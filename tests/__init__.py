"""Tests: laws and independent references first, examples second."""
