"""What passed between gateway and sampler, taken off the wire and made into traces."""
