"""The network: backbone, anchor generator, relation block, decoder, and its stages."""
