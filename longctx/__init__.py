"""What a long-context run is: config, data, rope, model, training, the command line."""
