"""The shop's story, told over HTTP: `make demo`."""
