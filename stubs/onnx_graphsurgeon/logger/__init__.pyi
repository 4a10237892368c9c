from onnx_graphsurgeon.logger.logger import G_LOGGER as G_LOGGER
