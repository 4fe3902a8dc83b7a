"""A procedural world of small pictures, and the script that pretrains models on it."""
