"""The model file and its graph: reading, viewing, inferring shapes, counting, editing, writing."""
