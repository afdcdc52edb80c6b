"""What a network is made of: maps of layers, attention, segments between two layers, stages, other input sizes."""
